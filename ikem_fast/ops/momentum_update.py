"""Momentum update of the key encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ikem_fast.ops._checks import describe


@torch.no_grad()
def momentum_update_reference_(key_params: Sequence[Tensor], query_params: Sequence[Tensor], m: float) -> None:
    """``key = m · key + (1 - m) · query`` in place, tensor by tensor.

    Args:
        key_params: tensors of the key encoders.
        query_params: the query encoders' tensors, in the same order and of the same shapes.
        m: share of the old key that is kept, in [0, 1].

    Source: docs/method.md section 5.
    """
    if not 0 <= m <= 1:
        raise ValueError(f"m must be in [0, 1], got {m}")
    if len(key_params) != len(query_params):
        raise ValueError(f"query_params must be {len(key_params)} tensors as key_params is, got {len(query_params)}")
    for index, (key, query) in enumerate(zip(key_params, query_params, strict=True)):
        if key.shape != query.shape:
            raise ValueError(f"query_params[{index}] must be {describe(key)} as key_params is, got {describe(query)}")
        key.mul_(m).add_(query, alpha=1.0 - m)


momentum_update_ = momentum_update_reference_
