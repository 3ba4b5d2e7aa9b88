"""The linear heads that an evaluation trained, kept in a file, so that a trained model can name actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ikem_fast import safetensors_file
from ikem_fast.safetensors_file import TensorFileError

if TYPE_CHECKING:
    from ikem_fast.evaluation.linear import LinearEvaluation

HEADS_FILE = "linear_heads.safetensors"
_KIND = "ikem_fast linear heads"
_VERSION = 1


def mean_logits(features: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Logits (N, classes): the mean over modalities of one linear head each.

    Args:
        features: (S, N, d), a row for each modality of the view.
        weights: (S, classes, d).
        biases: (S, classes).
    """
    return torch.baddbmm(biases.unsqueeze(1), features, weights.mT).mean(dim=0)


@dataclass(frozen=True)
class LinearHeads:
    """Trained linear heads of one set of encoders.

    Attributes:
        class_names: names of the classes.
        views: view to the modalities whose logits it averages, the fullest last.
        weights: view to (S_view, classes, d) float32, in the order of the view's modalities.
        biases: view to (S_view, classes) float32.
        training: how they came about: ``recipe`` (the settings), ``seed``, ``step`` of the run when they were trained,
            and ``data`` (folder, preparation).
    """

    class_names: tuple[str, ...]
    views: dict[str, tuple[str, ...]]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    training: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by ``view.weight`` and ``view.bias``."""
        return {
            f"{view}.{name}": values[view]
            for view in self.views
            for name, values in (("weight", self.weights), ("bias", self.biases))
        }

    def description(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON can hold it."""
        views = {view: list(names) for view, names in self.views.items()}
        return {"class_names": list(self.class_names), "views": views, "training": self.training}

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearHeads:
        """Heads from what ``description`` and ``tensors`` gave.

        Raises:
            ValueError: a tensor is missing, or its shape or dtype is not what the description says.
        """
        try:
            class_names = tuple(map(str, description["class_names"]))
            views = {str(view): tuple(map(str, names)) for view, names in description["views"].items()}
            training = dict(description["training"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the heads' description is incomplete: {error!r}") from error
        heads = cls(class_names, views, {}, {}, training)
        for view, names in views.items():
            for name, values, shape in (
                ("weight", heads.weights, (len(names), len(class_names), None)),
                ("bias", heads.biases, (len(names), len(class_names))),
            ):
                tensor = tensors.get(f"{view}.{name}")
                fits = tensor is not None and tensor.dtype == torch.float32 and tensor.dim() == len(shape)
                if not fits or any(size not in (None, got) for size, got in zip(shape, tensor.shape, strict=True)):
                    got = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                    raise ValueError(f"{view}.{name} must be float32 of {len(names)} heads, got {got}")
                values[view] = tensor
        return heads


def save_heads(path: str | Path, results: Mapping[str, LinearEvaluation], **training: Any) -> None:
    """Writes the heads of linear evaluations as one safetensors file, atomically.

    Args:
        path: the file, by custom ``RUN/evaluation/linear_heads.safetensors``.
        results: by name of the encoders. Those of untrained encoders, which no file holds, have no use here.
        training: see ``LinearHeads.training``.
    """
    tensors, descriptions = {}, {}
    for encoders, result in results.items():
        views = {row.name: row.modalities for row in result.rows}
        heads = LinearHeads(result.class_names, views, result.weights, result.biases, training)
        tensors.update({f"{encoders}/{name}": tensor for name, tensor in heads.tensors().items()})
        descriptions[encoders] = heads.description()
    safetensors_file.write(path, _KIND, _VERSION, tensors, {"encoders": descriptions})


def load_heads(path: str | Path) -> dict[str, LinearHeads]:
    """Reads a file of ``save_heads``: heads by name of the encoders.

    Raises:
        TensorFileError: it is missing, damaged or no file of heads.
    """
    tensors, description = safetensors_file.read(path, _KIND, _VERSION)
    try:
        return {
            encoders: LinearHeads.restore(
                of_encoders,
                {
                    name.removeprefix(f"{encoders}/"): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(f"{encoders}/")
                },
            )
            for encoders, of_encoders in description["encoders"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} does not fit its own description: {error}") from error
