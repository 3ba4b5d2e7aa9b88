"""CUDA graphs as they behave, on the CPU: a capture runs nothing, a replay repeats what was captured, where it was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Records operators with their arguments, so that numbers and places of tensors stay as they were."""

    def __init__(self):
        super().__init__()
        self._calls = []
        self._before = []  # written tensors and what they held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        kwargs = kwargs or {}
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if func is torch.ops.aten.native_batch_norm.default:
            written += args[3:5]  # running statistics, of which its schema does not say that they are written
        self._before += [(tensor, tensor.detach().clone()) for tensor in tree_leaves(written) if tensor is not None]
        result = func(*args, **kwargs)
        places = {_place(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [t if isinstance(t, Tensor) and _place(t) not in places else None for t in tree_leaves(result)]
        self._calls.append((func, args, kwargs, made))
        return result

    @torch.no_grad()
    def undo(self):
        """As if nothing had run; what was made holds nothing of use."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()
        for *_, made in self._calls:
            for tensor in made:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made in self._calls:
            for place, tensor in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(tensor)


def _place(tensor):
    return tensor.untyped_storage()._cdata


class RecordedGraphs:
    """Stands in for ``ikem_fast.engine.cuda_graphs.CudaGraphs``.

    Args:
        problem: what a rehearsal finds.
        before_replay: called with the number of replays so far.
    """

    def __init__(self, problem=None, before_replay=lambda replays: None):
        self.problem = problem
        self.before_replay = before_replay
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, function):
        self.warm_ups += 1
        return function()

    def rehearse(self, function):
        return self.warm_up(function), self.problem

    def capture(self, function):
        self.captures += 1
        random_state = torch.get_rng_state()
        recording = Recording()
        try:
            with recording:
                result = function()
        finally:
            recording.undo()
            torch.set_rng_state(random_state)

        def replay():
            self.before_replay(self.replays)
            self.replays += 1
            recording.replay()
            return result

        return replay
