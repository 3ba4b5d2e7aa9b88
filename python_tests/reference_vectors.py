"""Reference vectors printed by the authors' release, and how closely they are compared."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from ikem_fast.reference import to_reference

FOLDER = Path(__file__).parent / "golden"
LETTERS = {
    "joint": "j",
    "motion": "m",
    "bone": "b",
    "acceleration": "a",
    "rotation_axis": "r",
    "angular_velocity": "o",
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as arrays:
        return dict(arrays)


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / name, weights_only=True)


def state_dict(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("state/"): torch.tensor(a) for key, a in arrays.items() if key.startswith("state/")}


def relative_error(actual, expected) -> float:
    """Largest difference over the largest magnitude of the expected array, so that zeros cannot pass."""
    actual, expected = (np.asarray(torch.as_tensor(x).detach().double()) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_gradients_agree(
    actual: dict[str, torch.Tensor], expected: dict[str, np.ndarray], encoder_of, share_with_jumps: float = 0.0
) -> None:
    """1e-3 relative, plus 1e-4 of the encoder's largest norm: biases in front of a norm have only rounding.

    A ReLU whose argument is 0 but for rounding makes gradients jump: the release's own, printed from float32, are up to
    1.1e-2 away from those computed in float64, in first blocks of single.npz. A ``share_with_jumps`` of the tensors may
    be ten times as far away.
    """
    norms: dict[str, float] = {}
    far: list[str] = []
    for name, gradient in expected.items():
        norms[encoder_of(name)] = max(norms.get(encoder_of(name), 0.0), float(np.linalg.norm(gradient)))
    for name, gradient in expected.items():
        difference = float(np.linalg.norm(actual[name].double().numpy() - gradient))
        tolerance = 1e-3 * float(np.linalg.norm(gradient)) + 1e-4 * norms[encoder_of(name)]
        message = f"gradient of {name} is off by {difference:.3g}, at most {tolerance:.3g}"
        assert difference <= tolerance * (10 if share_with_jumps else 1), message
        if difference > tolerance:
            far.append(message)
    assert len(far) <= share_with_jumps * len(expected), far


def reference_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a trainer under the release's names."""
    gradients = copy.deepcopy(module)
    with torch.no_grad():
        for copied, parameter in zip(gradients.parameters(), module.parameters(), strict=True):
            copied.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_reference(gradients)


def release_optimizer(module: torch.nn.Module, arrays: dict[str, np.ndarray]) -> torch.optim.SGD:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=float(arrays["lr"]), momentum=0.9, weight_decay=1e-4)


def assert_first_step_agrees(module: torch.nn.Module, arrays: dict[str, np.ndarray], *, num_gradients: int) -> None:
    """Queues and gradients after the first backward pass."""
    assert_queues_and_gradients_agree(
        to_reference(module), reference_gradients(module), arrays, num_gradients=num_gradients
    )


def assert_queues_and_gradients_agree(
    state: dict[str, torch.Tensor],
    actual: dict[str, torch.Tensor],
    arrays: dict[str, np.ndarray],
    *,
    num_gradients: int,
) -> None:
    """Those after the first backward pass, both under the release's names."""
    queues = {key.split("/")[1]: torch.tensor(a) for key, a in arrays.items() if key.startswith("queue_after_step0/")}
    assert queues
    for name, expected in queues.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)
    gradients = {key.removeprefix("grad/"): a for key, a in arrays.items() if key.startswith("grad/")}
    assert len(gradients) == num_gradients
    assert_gradients_agree(actual, gradients, encoder_of=lambda name: name.split(".")[0], share_with_jumps=0.02)


def assert_final_norms_agree(module: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Norms of all tensors after the last step."""
    assert_norms_agree(to_reference(module), arrays)


def assert_norms_agree(final: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> None:
    """Norms after the last step, under the release's names. Rounding has grown by then: first gradients are huge."""
    norms = {key.removeprefix("final_norm/"): float(a) for key, a in arrays.items() if key.startswith("final_norm/")}
    assert norms
    for name, expected in norms.items():
        assert abs(final[name].double().norm().item() - expected) <= 1e-2 * expected + 2e-5, name
