"""Whether an exported model computes what the model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ikem_fast.inference import FrozenEncoders, Model
from ikem_fast.inference.recordings import ClipReader

if TYPE_CHECKING:
    from ikem_fast.inference.model import Clips

# Of the largest number of a modality's features, or of the logits. Forms differ in the order of their sums.
TOLERANCE = 1e-4
_MAX_RECORDINGS = 64


def random_clips(model: Model, number: int = 5) -> tuple[Tensor, Tensor]:
    """Clips (N, 3, T, V, M) of joints that wander, the last person absent in one of them, and frame counts (N,)."""
    preparation, generator = model.preparation, torch.Generator().manual_seed(0)
    shape = (number, 3, preparation.num_frames, model.layout.num_joints, preparation.num_persons)
    clips = torch.randn(shape, generator=generator).cumsum(dim=2) * 0.05
    clips += torch.randn((number, 3, 1, *shape[3:]), generator=generator) * 0.5
    if shape[-1] > 1:
        clips[0, ..., -1] = 0
    return clips, torch.randint(10, 200, (number,), generator=generator)


def recordings_of(model: Model, clips: Clips) -> tuple[Tensor, Tensor]:
    """The first clips (N, 3, T, V, M), at most 64, and frame counts (N,) of recordings as for ``Model.embed``."""
    reader = ClipReader(model.layout, model.preparation, model.encoders.quirks.file_frame_count)
    batch = next(reader.batches(clips, None, _MAX_RECORDINGS), None)
    if batch is None:
        raise ValueError("clips must hold at least one recording, got none")
    return batch.clips, batch.num_frames


def outputs_of(model: Model, clips: Tensor, num_frames: Tensor, view: str | None) -> list[Tensor]:
    """Features and, of a model with heads, logits of a view."""
    embeddings = model.embed(clips, num_frames=num_frames)
    outputs = [embeddings.features]
    if model.heads is not None:
        outputs.append(model.classify(embeddings, view=view).logits)
    return outputs


def in_float32(model: Model) -> Model:
    """A copy of a model on the CPU that computes in float32."""
    encoders = FrozenEncoders.from_config({**model.encoders.config(), "precision": "fp32"})
    encoders.load_state_dict(model.encoders.state_dict())
    return Model(encoders, model.preparation, model.heads, model.origin, model.headless)


def largest_difference(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    """Of all outputs, as a share of the largest number of a modality's features or of the logits.

    Infinite where shapes differ or a number is not finite.
    """
    if [output.shape for output in outputs] != [output.shape for output in wanted]:
        return float("inf")
    largest = 0.0
    for output, other in zip(outputs, wanted, strict=True):
        rows = (output if output.dim() == 3 else output[None]).double().flatten(1)
        other_rows = (other if other.dim() == 3 else other[None]).double().flatten(1)
        if not (rows.isfinite().all() and other_rows.isfinite().all()):
            return float("inf")
        size = other_rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        largest = max(largest, ((rows - other_rows).abs().amax(dim=1) / size).max().item())
    return largest
