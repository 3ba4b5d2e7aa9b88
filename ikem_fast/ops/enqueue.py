"""The queues' ring buffer: new keys take the place of the oldest."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast.ops._checks import check_indices, check_tensor


@torch.no_grad()
def enqueue_reference_(queue: Tensor, keys: Tensor, pointer: Tensor) -> None:
    """Writes keys into the columns from ``pointer`` on, wrapping around, and moves the pointer past them.

    Of a batch longer than the queue the last K keys stay, where one by one they would have come to lie.

    Args:
        queue: (S, D, K) or (D, K), one key a column; changed in place.
        keys: (S, N, D) or (N, D), any N.
        pointer: (1,) int64 on the queue's device, the column of the next key; changed in place.

    Source: docs/method.md section 5.
    """
    queues = queue.unsqueeze(0) if queue.dim() == 2 else queue
    new_keys = keys.unsqueeze(0) if keys.dim() == 2 else keys
    check_tensor("queue", queues, "(S, D, K)", None, None, None)
    streams, size, queue_size = queues.shape
    check_tensor("keys", new_keys, "(S, N, D)", streams, None, size)
    check_indices("pointer", pointer, 1)
    num_keys = new_keys.shape[1]
    num_dropped = max(num_keys - queue_size, 0)
    offsets = torch.arange(num_dropped, num_keys, device=queue.device)
    queues.index_copy_(2, (pointer + offsets) % queue_size, new_keys[:, num_dropped:].transpose(1, 2).to(queue.dtype))
    pointer.add_(num_keys).remainder_(queue_size)


enqueue_ = enqueue_reference_
