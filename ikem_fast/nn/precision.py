"""In which numbers encoders compute."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16", "auto")


def check_precision(precision: str) -> str:
    """The argument, if it is one of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def activation_dtype(precision: str, weight: Tensor) -> torch.dtype:
    """The dtype of activations and products beside weights; a module in float64 stays in it."""
    if weight.dtype != torch.float32:
        return weight.dtype
    if precision == "bf16" or (precision == "auto" and computes_bfloat16(weight.device)):
        return torch.bfloat16
    return torch.float32
