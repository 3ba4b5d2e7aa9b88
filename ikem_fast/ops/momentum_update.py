"""Momentum update of the key encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import describe

_COMPILED_DTYPES = (torch.float32, torch.float64)


@torch.no_grad()
def momentum_update_(key_params: Sequence[Tensor], query_params: Sequence[Tensor], m: float) -> None:
    """``key = m · key + (1 - m) · query`` in place, all tensors in one call.

    float32 and float64 tensors of one device go to a compiled kernel: those that lie in memory as their partners do
    are updated where they are, others through a contiguous copy. Tensors of other dtypes, devices or of unlike
    partners are updated one by one.

    Args:
        key_params: tensors of the key encoders, none twice.
        query_params: the query encoders' tensors, in the same order and of the same shapes.
        m: share of the old key that is kept, in [0, 1].

    Raises:
        ValueError: another number or shape of tensors, or ``m`` out of its range.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 5.
    """
    _check(key_params, query_params, m)
    _extension.require()
    compiled: tuple[list[Tensor], list[Tensor]] = ([], [])
    others: tuple[list[Tensor], list[Tensor]] = ([], [])
    for key, query in zip(key_params, query_params, strict=True):
        first = compiled[0][0] if compiled[0] else key
        keys, queries = compiled if _fits(key, query, first.device) else others
        keys.append(key)
        queries.append(query)
    if compiled[0]:
        torch.ops.ikem_fast.momentum_update_(*compiled, m)
    momentum_update_reference_(*others, m)


@torch.no_grad()
def momentum_update_reference_(key_params: Sequence[Tensor], query_params: Sequence[Tensor], m: float) -> None:
    """:func:`momentum_update_` in plain PyTorch, tensor by tensor: the same arguments and errors."""
    _check(key_params, query_params, m)
    for key, query in zip(key_params, query_params, strict=True):
        key.mul_(m).add_(query, alpha=1.0 - m)


def _fits(key: Tensor, query: Tensor, device: torch.device) -> bool:
    return (
        key.dtype in _COMPILED_DTYPES
        and query.dtype == key.dtype
        and key.device == device
        and query.device == device
        and (device.type in ("cpu", "meta") or (device.type == "cuda" and _extension.cuda_available()))
    )


def _check(key_params: Sequence[Tensor], query_params: Sequence[Tensor], m: float) -> None:
    if not 0 <= m <= 1:
        raise ValueError(f"m must be in [0, 1], got {m}")
    if len(key_params) != len(query_params):
        raise ValueError(f"query_params must be {len(key_params)} tensors as key_params is, got {len(query_params)}")
    for index, (key, query) in enumerate(zip(key_params, query_params, strict=True)):
        if key.shape != query.shape:
            raise ValueError(f"query_params[{index}] must be {describe(key)} as key_params is, got {describe(query)}")


def _fake(key_tensors, query_tensors, momentum):
    _check(key_tensors, query_tensors, momentum)


if _extension.available():
    torch.library.register_fake("ikem_fast::momentum_update_", _fake)
