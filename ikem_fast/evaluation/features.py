"""Features of a set of clips: what linear evaluation, kNN and the training loop's own check are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.evaluation.subjects import Subject


@dataclass(frozen=True)
class Features:
    """Encoder features of N clips.

    Attributes:
        features: (S, N, d) float32 on the CPU, one row of N features per modality, not normalised.
        names: S names of the rows.
        labels: (N,) int64.
        sample_names: N names, in the order of the features.
    """

    features: Tensor
    names: tuple[str, ...]
    labels: Tensor
    sample_names: tuple[str, ...]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has the mode it had, also where they differed."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def extract(
    method: nn.Module,
    clip_set: ClipSet,
    *,
    part: str | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Features:
    """The features of every clip of a set, in the set's order (docs/method.md section 8: no augmentation, eval mode).

    Only the query encoders run, so queues, pointers and key encoders stay as they are, and so does the random state.

    Args:
        method: an ``IKEM`` or ``RelationalDistillation``; its parameters must already be on ``device``. With its quirk
            ``file_frame_count`` the time scale is the file's frame count, without it the number of detected frames.
        clip_set: the clips.
        part: of a distillation "student" (the default) or "teacher"; None for methods with one set of encoders.
        batch_size: clips per forward pass; memory use grows with it, results do not depend on it.
        device: where the encoders run.

    Raises:
        ValueError: for a batch size below 1 or an empty set.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(clip_set) == 0:
        raise ValueError("clip_set must hold at least one clip, got an empty set")
    arguments = {} if part is None else {"part": part}
    names = method.teacher_feature_names if part == "teacher" else method.feature_names
    rows: Tensor | None = None
    labels = torch.empty(len(clip_set), dtype=torch.int64)
    with torch.no_grad(), evaluation_mode(method):
        file_frame_count = method.quirks.file_frame_count
        for positions, batch in clip_set.in_batches(batch_size, device=device, file_frame_count=file_frame_count):
            features = method.features(batch.clips, batch.num_frames, **arguments)
            if rows is None:
                rows = torch.empty(features.shape[0], len(clip_set), features.shape[2])
            rows[:, positions] = features.float().cpu()
            labels[positions] = batch.labels.cpu()
    return Features(features=rows, names=tuple(names), labels=labels, sample_names=tuple(clip_set.names))


def extract_both(
    subject: Subject, sets: Sequence[ClipSet], batch_size: int, device: str | torch.device
) -> tuple[Features, ...]:
    """The features that a subject's encoders give the clips of some sets, train and test; moves them to ``device``."""
    subject.method.to(device)
    return tuple(
        extract(subject.method, clips, part=subject.part, batch_size=batch_size, device=device) for clips in sets
    )
