"""A training step, from stored clips to updated weights; on CUDA captured as a graph, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ikem_fast.data.sources import StoredBatch
from ikem_fast.engine.checkpoints import first_line
from ikem_fast.engine.cuda_graphs import open_graphs
from ikem_fast.engine.gradient_norm import limit_gradient_norms
from ikem_fast.methods import IKEM, RelationalDistillation, StepLosses
from ikem_fast.methods.common import ALONE
from ikem_fast.ops import AugmentationConfig, ClipViews, draw_views
from ikem_fast.ranges import phase

if TYPE_CHECKING:
    from ikem_fast.engine.distributed import SharedSteps

ACCURACY = "accuracy/"  # before the names of accuracies among a step's values
# Before a capture: libraries load, the optimiser makes its buffers, the allocator learns how much memory a step takes.
WARM_UP_STEPS = 3


class StepValues(NamedTuple):
    """Losses and accuracies of a step.

    Attributes:
        names: of the losses, then of the accuracies, with ``ACCURACY`` before them.
        values: one for each name, in a tensor on the device.
    """

    names: tuple[str, ...]
    values: Tensor


class TrainingStep:
    """Trains a method by one step every time it is called.

    A batch may come in parts, of which each goes through the encoders by itself: key encoders move before the first,
    queues are filled after the last, and the weights follow the mean of the parts' gradients. On several processes each
    one has a slice of the batch, and the gradient is the mean over all of them.

    Where the device has graphs, the first steps of a stage are launched kernel by kernel; then one is captured, which
    computes nothing, and replayed, as are all after it. Every call is one step, whichever way it runs. A replay reads
    and writes where the captured step did, so whatever differs between steps is a tensor that is filled anew: the
    batch, the epoch, the learning rate. Another stage, shape of batches or place of the clips is captured anew.

    Args:
        method: the module to train, on its device and in training mode.
        recipe: section ``pretrain`` or ``distill`` of the configuration.
        seed: of the augmentation.
        clip_length: T, frames of a clip.
        augmentation: what turns a clip into a view.
        capture: whether steps may be captured.
        shared: what takes steps together with other processes, which are not captured; ``None`` for a process alone.
        note: called with a sentence, once, if the device has graphs and steps are not captured.
    """

    def __init__(
        self,
        method: IKEM | RelationalDistillation,
        recipe: Any,
        *,
        seed: int,
        clip_length: int,
        augmentation: AugmentationConfig,
        capture: bool = True,
        shared: SharedSteps | None = None,
        note: Callable[[str], None],
    ) -> None:
        self._method = method
        self._recipe = recipe
        self._seed = seed
        self._clip_length = clip_length
        self._augmentation = augmentation
        self._note = note
        self._shared = shared
        self._contrast: Callable[..., StepLosses] = method.contrast
        self._trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        device = self._trained[0].device
        self._optimizer = torch.optim.SGD(
            self._trained,
            lr=torch.tensor(recipe.learning_rate, dtype=torch.float32, device=device),
            momentum=recipe.sgd_momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._stage = ""
        self._epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self._graphs = open_graphs(device)
        self._may_capture = capture
        self._captured: tuple[Any, ...] = ()  # stage and kind of batch that is being captured or is
        self._inputs: tuple[StoredBatch, ...] | None = None  # the batch that the captured step reads
        self._warm_up_steps = 0
        self._replay: Callable[[], StepValues] | None = None

    def begin_epoch(self, epoch: int, stage: str, learning_rate: float) -> None:
        """Sets what all steps of an epoch have in common. Nothing waits for the device."""
        if self._shared is not None and stage != self._stage:
            # Gradients of the stage before lie in what the old one holds.
            self._optimizer.zero_grad(set_to_none=True)
            self._contrast = self._method.contrast
            self._contrast = self._shared.data_parallel(self._method.contrast, self._method.stage_parameters(stage))
        self._stage = stage
        self._epoch.fill_(epoch)
        for group in self._optimizer.param_groups:
            group["lr"].fill_(learning_rate)

    @phase("training step")
    def __call__(self, *batch: StoredBatch) -> StepValues:
        """Trains on a batch, in equal parts, and returns its losses and accuracies, in a tensor of their own."""
        if self._graphs is not None and not self._may_capture:
            self._give_up("capture is false")
        elif self._graphs is not None and self._shared is not None:
            self._give_up("several processes train together")
        if self._graphs is None:
            return self._train(batch)
        self._take_in(batch)
        if self._replay is None and self._warm_up_steps < WARM_UP_STEPS:
            names, values = self._warm_up()
        else:
            if self._replay is None:
                try:
                    self._replay = self._graphs.capture(lambda: self._train(self._inputs))
                except Exception as error:
                    self._give_up(_first_cause(error))
                    return self._train(batch)
            names, values = self._replay()
        return StepValues(names, values.clone())

    def _take_in(self, batch: Sequence[StoredBatch]) -> None:
        """Brings a batch to where captured steps read it; what was captured for others is forgotten."""
        captured = (self._stage, *map(_kind, batch))
        if captured != self._captured:
            self._replay = self._inputs = None  # first, for the memory that they hold
            self._captured, self._inputs, self._warm_up_steps = captured, tuple(map(_place_like, batch)), 0
        for part, place in zip(batch, self._inputs, strict=True):
            _copy(part, place)

    def _warm_up(self) -> StepValues:
        """A step as it will be captured, but run. The last one shows whether that is possible."""
        self._warm_up_steps += 1
        if self._warm_up_steps < WARM_UP_STEPS:
            return self._graphs.warm_up(lambda: self._train(self._inputs))
        values, problem = self._graphs.rehearse(lambda: self._train(self._inputs))
        if problem is not None:
            self._give_up(problem)
        return values

    def _train(self, batch: Sequence[StoredBatch]) -> StepValues:
        """The step itself."""
        groups = ALONE if self._shared is None else self._shared.groups
        self._method.begin_step(self._stage)
        self._optimizer.zero_grad(set_to_none=True)
        parts = []
        for number, part in enumerate(batch, start=1):
            # Gradients of the parts before the last add up here, and go to the other processes with the last one's.
            alone = self._shared is not None and number < len(batch)
            with self._contrast.no_sync() if alone else nullcontext():
                parts.append(self._contrast(*self._views(part), self._stage, groups))
                with phase("backward"):
                    (parts[-1].total if len(batch) == 1 else parts[-1].total / len(batch)).backward()
        self._method.end_step(torch.cat([part.keys for part in parts], dim=1), groups)
        if self._shared is not None and groups.statistics is None:
            self._shared.average_running_statistics(self._method)
        if self._recipe.max_gradient_norm is not None:
            with phase("gradient limit"):
                limit_gradient_norms(self._trained, self._recipe.max_gradient_norm)
        with phase("optimiser step"):
            self._make_momentum()
            self._optimizer.step()
        names, values = _values(parts[0])
        if len(parts) > 1:
            values = torch.stack([_values(part).values for part in parts]).mean(dim=0)
        return StepValues(names, values if self._shared is None else self._shared.average(values))

    @phase("views")
    def _views(self, batch: StoredBatch) -> tuple[ClipViews, ClipViews]:
        parameters = draw_views(self._seed, self._epoch, batch.samples, self._clip_length, self._augmentation)
        return self._method.views(batch.clips, batch.num_frames, batch.indices, parameters)

    def _make_momentum(self) -> None:
        """Zeros, which the first update finds, for weights that now have a gradient for the first time.

        The fused update makes them for all weights at once or for none, and stage 2 has weights that stage 1 has not.
        """
        for parameter in self._trained if self._recipe.sgd_momentum else ():
            if parameter.grad is not None and self._optimizer.state[parameter].get("momentum_buffer") is None:
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _give_up(self, reason: str) -> None:
        """Ends all capturing."""
        self._graphs = self._replay = self._inputs = None
        self._note(f"training steps are not captured as a CUDA graph: {reason}")

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, for a checkpoint."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what ``optimizer_state`` gave, on whatever device that was; ValueError for another module's."""
        # The recipe is the configuration's; only what training made of it so far comes from the checkpoint.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for number, parameter in enumerate(self._trained):
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None and momentum.shape != parameter.shape:
                raise ValueError(
                    f"the momentum of parameter {number} must be {tuple(parameter.shape)}, got {tuple(momentum.shape)}"
                )
        self._captured, self._replay = (), None  # which read and wrote the state before


def _values(step: StepLosses) -> StepValues:
    values = {**step.losses, **{ACCURACY + name: value for name, value in step.accuracies.items()}}
    return StepValues(tuple(values), torch.stack(list(values.values())).detach())


def _kind(batch: StoredBatch) -> tuple[Any, ...]:
    """What batches of the same capture have in common: shapes, and the place of clips that are all on the device."""
    place = () if batch.indices is None else (batch.clips.data_ptr(), batch.num_frames.data_ptr())
    return (batch.clips.shape, batch.clips.dtype, batch.samples.shape, *place)


def _place_like(batch: StoredBatch) -> StoredBatch:
    """Tensors that batches of the same kind can be copied to; clips that are all on the device stay where they are."""
    if batch.indices is not None:
        return replace(batch, indices=torch.empty_like(batch.indices), samples=torch.empty_like(batch.samples))
    clips, num_frames, samples = (torch.empty_like(t) for t in (batch.clips, batch.num_frames, batch.samples))
    return StoredBatch(clips, num_frames, None, samples)


def _copy(batch: StoredBatch, place: StoredBatch) -> None:
    place.samples.copy_(batch.samples)
    if batch.indices is not None:
        place.indices.copy_(batch.indices)
    else:
        place.clips.copy_(batch.clips)
        place.num_frames.copy_(batch.num_frames)


def _first_cause(error: BaseException) -> str:
    """In a line, what went wrong first: a capture that fails inside fails once more when it is ended."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
