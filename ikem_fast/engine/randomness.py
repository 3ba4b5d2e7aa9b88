"""Everything random in a run: what is drawn anew for each step, and the state of torch, numpy and python."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Keep streams apart from others of the same seed; the numbers are part of what makes a run repeatable.
ORDER = 0
RANKS = 1


def _derived_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, ORDER, epoch)."""
    return torch.Generator().manual_seed(_derived_seed(*key))


def epoch_order(num_clips: int, seed: int, epoch: int) -> torch.Tensor:
    """The (num_clips,) int64 order of the clips in an epoch."""
    return torch.randperm(num_clips, generator=generator(seed, ORDER, epoch))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seeds what is not drawn anew for each step, such as dropout, otherwise for every process of a run."""
    seed_everything(_derived_seed(seed, RANKS, step, rank))


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """State of all generators as plain values and tensors, so that ``weights_only`` loading takes it.

    Args:
        device: the CUDA device whose generator is meant; ``None`` for those of all devices.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(device),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def _cuda_states(device: torch.device | None) -> list[torch.Tensor]:
    if not torch.cuda.is_available():
        return []
    if device is None:
        return torch.cuda.get_rng_state_all()
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Puts back what ``random_state`` gave for the same ``device``, or for all; states of CUDA devices that are not
    there are left out.
    """
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0], device)
    elif device is None:
        for index, device_state in enumerate(state["cuda"]):
            if torch.cuda.is_available() and index < torch.cuda.device_count():
                torch.cuda.set_rng_state(device_state, index)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
