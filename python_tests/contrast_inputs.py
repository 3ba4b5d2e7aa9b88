"""Random unit embeddings for the tests of the losses, and the losses' formulas written out for one clip."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional


def units(*shape: int, dim: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=dim).to(dtype)


def negative_log_share(logits: list[float], positives: list[int]) -> float:
    """-mean over the positives of log(exp(logit) / sum of exp(logits))."""
    logits = np.asarray(logits, dtype=np.float64)
    total = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    return float(np.mean([total - logits[i] for i in positives]))


def pair_logits(positive: float, own: np.ndarray, other: np.ndarray, temperature: float) -> list[float]:
    """[p, s, s * g] / temperature."""
    return [positive / temperature, *(own / temperature), *(own * other / temperature)]


def largest(values: np.ndarray, topk: int) -> list[int]:
    return list(np.argsort(-values)[:topk])
