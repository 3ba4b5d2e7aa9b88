"""A trained model in use: features and actions of recordings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ikem_fast.data.listing import BadFile
from ikem_fast.data.preparation import Preparation
from ikem_fast.data.readers import DataError, Reader
from ikem_fast.engine.config import find_device
from ikem_fast.evaluation.heads import LinearHeads, mean_logits
from ikem_fast.evaluation.knn import fused_features
from ikem_fast.inference.encoders import FrozenEncoders
from ikem_fast.inference.recordings import ClipReader
from ikem_fast.layouts import Layout

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet

    # See ``Model.embed``.
    Clips = str | Path | np.ndarray | Tensor | ClipSet | Iterable[str | Path | np.ndarray | Tensor]


class ModelError(ValueError):
    """A run or file that cannot be used as a model, or a model that lacks what is asked of it."""


@dataclass(frozen=True)
class Embeddings:
    """Features of N recordings.

    Attributes:
        features: (S, N, d) float32 on the CPU, one row of N features per modality, not normalised.
        names: S names of the rows.
        sample_names: N names, of files without folder and suffix.
        sources: N paths of the files; the names where there are no files.
        skipped: recordings that could not be used, and why.
    """

    features: Tensor
    names: tuple[str, ...]
    sample_names: tuple[str, ...]
    sources: tuple[str, ...]
    skipped: tuple[BadFile, ...] = ()

    def __len__(self) -> int:
        return len(self.sample_names)

    @property
    def fused(self) -> Tensor:
        """(N, S·d): each modality's feature normalised, side by side, so that cosines are means over modalities."""
        return fused_features(self.features)


@dataclass(frozen=True)
class Classification:
    """Actions of N recordings.

    Attributes:
        logits: (N, classes) float32 on the CPU.
        class_names: names of the classes.
        view: the modality or combination of modalities that judged.
        sample_names, sources, skipped: as in ``Embeddings``.
    """

    logits: Tensor
    class_names: tuple[str, ...]
    view: str
    sample_names: tuple[str, ...]
    sources: tuple[str, ...]
    skipped: tuple[BadFile, ...] = ()

    def __len__(self) -> int:
        return len(self.sample_names)

    @property
    def probabilities(self) -> Tensor:
        """(N, classes), each row summing to 1. Softmax of the logits: how sure the heads are, not how often right."""
        return self.logits.softmax(dim=1)

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the class of each recording, a number into ``class_names``."""
        return self.logits.argmax(dim=1)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each recording the ``k`` likeliest classes (all, if there are fewer) with their probabilities."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        values, classes = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[number], value) for number, value in zip(*row, strict=True)]
            for row in zip(classes.tolist(), values.tolist(), strict=True)
        ]


class Model:
    """Trained encoders, what recordings must go through before them, and linear heads where they were trained.

    Made by ``ikem_fast.load``.

    Attributes:
        encoders: a module that maps clips to features.
        preparation: of the data set the encoders were trained on; None where nobody knows it.
        heads: linear heads; None where there are none.
        origin: what the model was made of, as plain values.
        headless: why there are no heads, in words.
    """

    def __init__(
        self,
        encoders: FrozenEncoders,
        preparation: Preparation | None,
        heads: LinearHeads | None,
        origin: Mapping[str, Any],
        headless: str = "the model has no linear heads",
    ) -> None:
        self.encoders = encoders
        self.preparation = preparation
        self.heads = heads
        self.origin = dict(origin)
        self.headless = headless
        self.device = torch.device("cpu")

    def __repr__(self) -> str:
        classes = f"{len(self.class_names)} classes" if self.heads else "no heads"
        return f"Model({self.layout.name}, {', '.join(self.names)}, {classes}, on {self.device})"

    @property
    def layout(self) -> Layout:
        """The skeleton that recordings must have."""
        return self.encoders.layout

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows of features."""
        return self.encoders.feature_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; none without heads."""
        return self.heads.class_names if self.heads else ()

    @property
    def views(self) -> dict[str, tuple[str, ...]]:
        """The views that ``classify`` can judge by and their modalities, the fullest last; none without heads."""
        return dict(self.heads.views) if self.heads else {}

    def to(self, device: str | torch.device) -> Model:
        """Moves the model to ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``, and returns it.

        Raises:
            ConfigError: there is no such device.
        """
        self.device = find_device(str(device))
        self.encoders.to(self.device)
        return self

    def embed(
        self,
        clips: Clips,
        *,
        num_frames: Sequence[int] | np.ndarray | Tensor | None = None,
        modalities: Sequence[str] | None = None,
        batch_size: int = 256,
        reader: str | Reader | None = None,
        on_error: str = "fail",
    ) -> Embeddings:
        """Features of recordings or clips.

        Args:
            clips: one of

                - paths of recordings in any supported format (NTU ``.skeleton``, NW-UCLA ``.json``, UTD-MHAD ``.mat``),
                  one or several, or of folders of them; read and prepared as the model's data set was;
                - arrays or tensors (3, F, V, M) in metres, zero where a person is absent, one or several of different
                  lengths and up to the data set's number of persons; prepared alike;
                - a ``ClipSet`` that was prepared alike;
                - prepared clips (N, 3, T, V, M), with ``num_frames``.
            num_frames: (N,) frames of the recordings that prepared clips are of, by which velocities are scaled.
            modalities: some of ``names``, in the order of the result; by default all.
            batch_size: clips per forward pass; memory use grows with it, results do not depend on it.
            reader: how files are read, a dataset's name or a ``Reader``; by default their suffix decides.
            on_error: ``"skip"`` leaves out recordings that cannot be read or used, and lists them in the result.

        Raises:
            DataError: a recording cannot be read or used, or has another skeleton than the model's; it is named.
            ValueError: an argument does not fit, or nothing (usable) is given.
        """
        names = self.names if modalities is None else tuple(modalities)
        unknown = [name for name in names if name not in self.names]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(f"modalities must be some of {', '.join(self.names)}, got {', '.join(names) or 'none'}")
        source = ClipReader(self.layout, self.preparation, self.encoders.quirks.file_frame_count, reader, on_error)
        rows, sample_names, sources = [], [], []
        for batch in source.batches(clips, num_frames, batch_size):
            with torch.inference_mode():
                features = self.encoders.features(batch.clips.to(self.device), batch.num_frames.to(self.device), names)
            rows.append(features.float().cpu())
            sample_names += batch.names
            sources += batch.sources
        if not rows:
            if source.skipped:
                raise DataError(f"none of the {len(source.skipped)} recordings can be used; {source.skipped[0]}")
            raise ValueError("clips must hold at least one recording, got none")
        return Embeddings(torch.cat(rows, dim=1), names, tuple(sample_names), tuple(sources), tuple(source.skipped))

    def classify(
        self,
        clips: Clips | Embeddings,
        *,
        view: str | Mapping[str, float] | None = None,
        num_frames: Sequence[int] | np.ndarray | Tensor | None = None,
        batch_size: int = 256,
        reader: str | Reader | None = None,
        on_error: str = "fail",
    ) -> Classification:
        """Actions of recordings or clips, by the linear heads of ``evaluate linear``.

        Args:
            clips: as for ``embed``; or what ``embed`` gave.
            view: the modality, or the combination of modalities whose heads were trained on their mean logits; by
                default the fullest. Or weights by view, such as ``{"joint": 0.6, "motion": 0.6, "bone": 0.4}``, for
                the weighted sum of logits of heads that were trained apart.
            num_frames, batch_size, reader, on_error: as for ``embed``.

        Raises:
            ModelError: the model has no heads.
            DataError, ValueError: as for ``embed``; an unknown view.
        """
        weights, name = self._weigh(view)
        needed = self.modalities_of(view)
        if not isinstance(clips, Embeddings):
            options = {"num_frames": num_frames, "batch_size": batch_size, "reader": reader, "on_error": on_error}
            clips = self.embed(clips, modalities=needed, **options)
        missing = [row for row in needed if row not in clips.names]
        if missing:
            raise ValueError(f"clips must have features of {', '.join(needed)}, got {', '.join(clips.names)}")
        heads, logits = self.heads, torch.zeros(len(clips), len(self.class_names))
        for part, weight in weights.items():
            rows = [clips.names.index(row) for row in heads.views[part]]
            logits = logits + weight * mean_logits(clips.features[rows], heads.weights[part], heads.biases[part])
        return Classification(logits, heads.class_names, name, clips.sample_names, clips.sources, clips.skipped)

    def modalities_of(self, view: str | Mapping[str, float] | None = None) -> tuple[str, ...]:
        """The modalities that ``classify`` needs for a view (see there), in the order of ``names``."""
        weights, _ = self._weigh(view)
        return tuple(name for name in self.names if any(name in self.heads.views[part] for part in weights))

    def _weigh(self, view: str | Mapping[str, float] | None) -> tuple[dict[str, float], str]:
        """Weights by view, and how the result calls them."""
        heads = self.heads
        if heads is None:
            raise ModelError(f"{self.headless}: no actions can be named; `evaluate linear` trains linear heads")
        if isinstance(view, Mapping):
            weights = {part: float(weight) for part, weight in view.items()}
            name = " + ".join(f"{weight:g} {part}" for part, weight in weights.items())
        else:
            name = list(heads.views)[-1] if view is None else view
            weights = {name: 1.0}
        unknown = [part for part in weights if part not in heads.views]
        if unknown or not weights:
            raise ValueError(f"view must be one of {', '.join(heads.views)}, or weights of some, got {view!r}")
        for part in weights:
            if not (heads.weights[part].isfinite().all() and heads.biases[part].isfinite().all()):
                raise ModelError(f"the heads of view '{part}' are not finite: their training diverged")
        return weights, name
