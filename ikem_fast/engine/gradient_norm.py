"""Limits the length of gradients, those of each modality's encoder by themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def limit_gradient_norms(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shortens each stream's gradient to a Euclidean norm of at most ``max_norm``, in place.

    Streams are limited apart, as if they were trained alone: a modality with steep losses does not slow the others
    down, and what a modality learns in stage 1 does not depend on which others are trained beside it. Nothing waits
    for the device.

    Args:
        parameters: stacked over S streams, (S, ...) each; those without a gradient are left out.
        max_norm: above 0.

    Returns:
        (S,) norms before the limit.

    Raises:
        ValueError: gradients of different numbers of streams.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(0)
    num_streams = {len(gradient) for gradient in gradients}
    if len(num_streams) != 1:
        raise ValueError(f"parameters must be stacked over the same streams, got {sorted(num_streams)} of them")
    norms = torch.linalg.vector_norm(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), dim=1)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
    return norms
