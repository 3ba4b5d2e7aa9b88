"""Argument checks shared by the ops: each message names the argument, what is expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast import _extension


def describe(value: object) -> str:
    """A value in an error message: shape and dtype of a tensor, the value itself otherwise."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


def check_tensor(name: str, value: object, shape: str, *sizes: int | None) -> None:
    """Checks a floating-point tensor's shape; ``None`` accepts any size. ``shape`` is how the message writes it."""
    fits = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == len(sizes)
        and all(wanted is None or wanted == size for wanted, size in zip(sizes, value.shape, strict=True))
    )
    if not fits:
        known = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must be {shape} = ({known}) floating point, got {describe(value)}")


def check_clips(clips: object) -> None:
    """Checks a batch of clips (N, C, T, V, M)."""
    if not isinstance(clips, Tensor) or not clips.is_floating_point() or clips.dim() != 5:
        raise ValueError(f"clips must be (N, C, T, V, M) floating point, got {describe(clips)}")


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def check_topk(topk: int, queue_size: int) -> None:
    if not 1 <= topk <= queue_size:
        raise ValueError(f"topk must be in 1 ... K = {queue_size}, got {topk}")


def check_constant(name: str, value: Tensor) -> None:
    """Checks that no gradient is wanted where none is computed."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, which is not computed: pass {name}.detach()")


# What a queue may be beside rows of a dtype: float32 is rounded as it is read.
QUEUE_DTYPES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float64: (torch.float64,),
}


def check_rows_and_queue(name: str, rows: Tensor, queue: Tensor, queue_name: str = "queue") -> None:
    """Checks dtypes and devices of rows that are compared with a queue, and that the queue needs no gradient."""
    if rows.dtype not in QUEUE_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float64, got {describe(rows)}")
    allowed = QUEUE_DTYPES[rows.dtype]
    if queue.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{queue_name} must be {names} for {name} {describe(rows)}, got {describe(queue)}")
    if queue.device != rows.device:
        raise ValueError(f"{queue_name} must be on {name}'s device {rows.device}, got {queue.device}")
    check_constant(queue_name, queue)


def computed_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of sums, losses and gradients."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def as_computed(values: Tensor) -> Tensor:
    return values.to(computed_dtype(values))


def has_kernel(values: Tensor) -> bool:
    """Whether ops that compute in float32 and float64 have a kernel for the values' device and dtype."""
    if values.is_cuda:
        return values.dtype != torch.float64 and _extension.cuda_available()
    return values.device.type in ("cpu", "meta")


def check_queries_keys_queue(q: Tensor, k: Tensor, queue: Tensor) -> None:
    """Checks the three tensors of the contrastive losses: q and k (S, N, D), queue (S, D, K)."""
    check_tensor("q", q, "(S, N, D)", None, None, None)
    streams, num_clips, size = q.shape
    check_tensor("k", k, "(S, N, D)", streams, num_clips, size)
    check_tensor("queue", queue, "(S, D, K)", streams, size, None)


def check_indices(name: str, value: object, length: int) -> None:
    """Checks a vector of whole numbers of a given length."""
    integral = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    if not integral or tuple(value.shape) != (length,):
        raise ValueError(f"{name} must be ({length},) int64, got {describe(value)}")
