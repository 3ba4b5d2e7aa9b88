"""Everything random in a run: what is drawn anew for each step, and the state of torch, numpy and python."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Keeps the stream apart from others of the same seed; the number is part of what makes a run repeatable.
ORDER = 0


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, ORDER, epoch)."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed & (2**63 - 1))


def epoch_order(num_clips: int, seed: int, epoch: int) -> torch.Tensor:
    """The (num_clips,) int64 order of the clips in an epoch."""
    return torch.randperm(num_clips, generator=generator(seed, ORDER, epoch))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """State of all generators as plain values and tensors, so that ``weights_only`` loading takes it."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what ``random_state`` gave; states of CUDA devices that are not there are left out."""
    torch.set_rng_state(state["torch"])
    for index, device_state in enumerate(state["cuda"]):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(device_state, index)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
