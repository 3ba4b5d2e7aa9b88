"""The queues' ring buffer: new keys take the place of the oldest."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import check_tensor, describe

_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@torch.no_grad()
def enqueue_(
    queue: Tensor, keys: Tensor, pointer: Tensor, first_column: int = 0, queue_size: int | None = None
) -> None:
    """Writes keys into the columns from ``pointer`` on, wrapping around, and moves the pointer past them.

    Of a batch longer than the queue the last K keys stay, where one by one they would have come to lie. Several ranks'
    keys go in at once, one rank's after another along N. Nothing waits for the device.

    A part of a queue, of which other ranks keep the rest, takes the keys that belong into its columns and leaves out
    the others; its columns and the pointer become what those of the whole queue would.

    Args:
        queue: (S, D, K) or (D, K), one key a column, K at least 1; changed in place. Any strides. With ``queue_size``,
            the columns ``first_column ... first_column + columns - 1`` of a queue of that many.
        keys: (S, N, D) or (N, D), any N, also 0; converted to the queue's dtype. Any strides.
        pointer: (1,) int64 on the queue's device, the column of the next key in the whole queue, taken modulo K;
            changed in place.
        first_column: the first of the queue's columns that are in ``queue``.
        queue_size: K; ``None`` if ``queue`` holds all columns.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or columns that are not in the queue.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 5.
    """
    _check(queue, keys, pointer, first_column, queue_size)
    _extension.require()
    if not _has_kernel(queue, keys):
        enqueue_reference_(queue, keys, pointer, first_column, queue_size)
        return
    torch.ops.ikem_fast.enqueue_(queue, keys, pointer, first_column, queue_size)


@torch.no_grad()
def enqueue_reference_(
    queue: Tensor, keys: Tensor, pointer: Tensor, first_column: int = 0, queue_size: int | None = None
) -> None:
    """:func:`enqueue_` in plain PyTorch: the same arguments, result and errors."""
    _check(queue, keys, pointer, first_column, queue_size)
    queues = queue.unsqueeze(0) if queue.dim() == 2 else queue
    new_keys = keys.unsqueeze(0) if keys.dim() == 2 else keys
    columns, num_keys = queues.shape[2], new_keys.shape[1]
    queue_size = columns if queue_size is None else queue_size
    num_dropped = max(num_keys - queue_size, 0)
    num_kept = num_keys - num_dropped
    start = (pointer + num_dropped) % queue_size
    # The columns that keys may go into: from where the keys begin or, if that is not here, from the first one.
    begin = torch.where((start >= first_column) & (start < first_column + columns), start - first_column, 0)
    written = (begin + torch.arange(min(num_kept, columns), device=queue.device)) % columns
    key = (first_column + written - start) % queue_size
    new = new_keys[:, num_dropped:].index_select(1, key.clamp(max=max(num_kept - 1, 0))).transpose(1, 2)
    queues.index_copy_(2, written, torch.where(key < num_kept, new.to(queue.dtype), queues.index_select(2, written)))
    pointer.add_(num_keys).remainder_(queue_size)


def _has_kernel(queue: Tensor, keys: Tensor) -> bool:
    if queue.dtype not in _COMPILED_DTYPES or keys.dtype not in _COMPILED_DTYPES:
        return False
    return queue.device.type in ("cpu", "meta") or (queue.is_cuda and _extension.cuda_available())


def _check(queue: Tensor, keys: Tensor, pointer: Tensor, first_column: int, queue_size: int | None) -> None:
    if isinstance(queue, Tensor) and queue.dim() == 2:
        check_tensor("queue", queue, "(D, K)", None, None)
        check_tensor("keys", keys, "(N, D)", None, queue.shape[0])
    else:
        check_tensor("queue", queue, "(S, D, K)", None, None, None)
        check_tensor("keys", keys, "(S, N, D)", queue.shape[0], None, queue.shape[1])
    if queue.shape[-1] == 0:
        raise ValueError(f"queue must have at least one column, got {describe(queue)}")
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64 or tuple(pointer.shape) != (1,):
        raise ValueError(f"pointer must be (1,) int64, got {describe(pointer)}")
    for name, value in (("keys", keys), ("pointer", pointer)):
        if value.device != queue.device:
            raise ValueError(f"{name} must be on the queue's device {queue.device}, got {value.device}")
    columns = queue.shape[-1]
    queue_size = columns if queue_size is None else queue_size
    if queue_size < columns:
        raise ValueError(f"queue_size must be at least the queue's {columns} columns, got {queue_size}")
    if not 0 <= first_column <= queue_size - columns:
        raise ValueError(
            f"first_column must be in 0 ... queue_size - columns = {queue_size - columns}, got {first_column}"
        )


def _fake(queue, keys, pointer, first_column=0, queue_size=None):
    _check(queue, keys, pointer, first_column, queue_size)


if _extension.available():
    torch.library.register_fake("ikem_fast::enqueue_", _fake)
