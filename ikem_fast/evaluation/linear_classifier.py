"""Encoders with a linear classifier each: what the linear evaluation trains, as one module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.methods.common import THREE_MODALITIES, ModalityModule, check_sizes, encoder_input
from ikem_fast.modalities import MODALITIES
from ikem_fast.quirks import Quirks

_VIEWS = {"3views": THREE_MODALITIES}


class LinearClassifier(ModalityModule):
    """One encoder and one linear head per modality; logits of several modalities are averaged.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the S modalities.
        num_classes: number of actions.
        hidden_channels: h of the encoders.
        feature_size: d of the encoders.
        dropout: of the encoders; without effect in eval mode.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``, of the encoders.
        quirks: behaviours of the authors' release.

    Source: docs/method.md section 8.
    """

    def __init__(
        self,
        layout: str | Layout = "ntu-rgb+d",
        modalities: Iterable[str] = MODALITIES,
        *,
        num_classes: int,
        hidden_channels: int = 16,
        feature_size: int = 256,
        dropout: float = 0.5,
        precision: str = "fp32",
        quirks: Quirks = Quirks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(layout, modalities, quirks, precision)
        check_sizes(num_classes=num_classes)
        self.num_classes = num_classes
        self.hidden_channels = hidden_channels
        self.feature_size = feature_size
        self.dropout = dropout
        self.encoders = self.encoder(len(self.modalities), num_classes)
        self.eval()

    def forward(self, clips: Tensor, num_frames: Tensor, view: str | Iterable[str] = "all") -> Tensor:
        """Logits (N, classes), the mean over the modalities of a view.

        Args:
            clips: (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
            view: ``"all"`` modalities, ``"3views"`` (joint, motion and bone), one modality's name, or several names.
        """
        names = self._names(view)
        streams = [self.modalities.index(name) for name in names]
        return self.encoders.of_streams(encoder_input(self.derive(clips, num_frames, names)), streams).mean(dim=0)

    def _names(self, view: str | Iterable[str]) -> tuple[str, ...]:
        if isinstance(view, str):
            names = self.modalities if view == "all" else _VIEWS.get(view, (view,))
        else:
            names = tuple(view)
        unknown = [name for name in names if name not in self.modalities]
        if unknown or not names:
            choices = ", ".join(["all", *_VIEWS, *self.modalities])
            raise ValueError(f"view must be one of {choices}, or several of the modalities, got {view!r}")
        return names
