"""The queues' ring buffer: new keys take the place of the oldest."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import check_tensor, describe

_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@torch.no_grad()
def enqueue_(queue: Tensor, keys: Tensor, pointer: Tensor) -> None:
    """Writes keys into the columns from ``pointer`` on, wrapping around, and moves the pointer past them.

    Of a batch longer than the queue the last K keys stay, where one by one they would have come to lie. Several ranks'
    keys go in at once, one rank's after another along N. Nothing waits for the device.

    Args:
        queue: (S, D, K) or (D, K), one key a column, K at least 1; changed in place. Any strides.
        keys: (S, N, D) or (N, D), any N, also 0; converted to the queue's dtype. Any strides.
        pointer: (1,) int64 on the queue's device, the column of the next key, taken modulo K; changed in place.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 5.
    """
    _check(queue, keys, pointer)
    _extension.require()
    if not _has_kernel(queue, keys):
        enqueue_reference_(queue, keys, pointer)
        return
    torch.ops.ikem_fast.enqueue_(queue, keys, pointer)


@torch.no_grad()
def enqueue_reference_(queue: Tensor, keys: Tensor, pointer: Tensor) -> None:
    """:func:`enqueue_` in plain PyTorch: the same arguments, result and errors."""
    _check(queue, keys, pointer)
    queues = queue.unsqueeze(0) if queue.dim() == 2 else queue
    new_keys = keys.unsqueeze(0) if keys.dim() == 2 else keys
    queue_size, num_keys = queues.shape[2], new_keys.shape[1]
    num_dropped = max(num_keys - queue_size, 0)
    offsets = torch.arange(num_dropped, num_keys, device=queue.device)
    queues.index_copy_(2, (pointer + offsets) % queue_size, new_keys[:, num_dropped:].transpose(1, 2).to(queue.dtype))
    pointer.add_(num_keys).remainder_(queue_size)


def _has_kernel(queue: Tensor, keys: Tensor) -> bool:
    if queue.dtype not in _COMPILED_DTYPES or keys.dtype not in _COMPILED_DTYPES:
        return False
    return queue.device.type in ("cpu", "meta") or (queue.is_cuda and _extension.cuda_available())


def _check(queue: Tensor, keys: Tensor, pointer: Tensor) -> None:
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


def _fake(queue, keys, pointer):
    _check(queue, keys, pointer)


if _extension.available():
    torch.library.register_fake("ikem_fast::enqueue_", _fake)
