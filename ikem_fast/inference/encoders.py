"""Trained encoders alone: what is left of a trainer when it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.layouts import from_dict as layout_from_dict
from ikem_fast.methods import IKEM, RelationalDistillation, evaluated_encoders
from ikem_fast.methods.common import ModalityModule, encoder_input, fuse_early
from ikem_fast.methods.distillation import EARLY_FUSION
from ikem_fast.quirks import Quirks


class FrozenEncoders(ModalityModule):
    """One encoder a modality, or one that is fed all of them, in eval mode and without gradients.

    ``ikem_fast.evaluation.extract`` takes it as it takes a trainer.

    Args:
        layout: the skeleton.
        modalities: names of the modalities.
        hidden_channels: h of the encoders.
        feature_size: d of the encoders.
        chest_normal: whether the root's bone is the chest normal, or zero.
        early_fusion: one encoder with the channels of all modalities.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``.
        quirks: behaviours of the authors' release.
    """

    def __init__(
        self,
        layout: Layout,
        modalities: Iterable[str],
        *,
        hidden_channels: int,
        feature_size: int,
        chest_normal: bool,
        early_fusion: bool,
        precision: str,
        quirks: Quirks,
    ) -> None:
        super().__init__(layout, modalities, quirks, precision)
        self.hidden_channels = hidden_channels
        self.feature_size = feature_size
        self.dropout = 0.0
        # The trainer's own choice, which may know more modalities than are left.
        self.chest_normal = chest_normal
        self.early_fusion = early_fusion
        self.feature_names = (EARLY_FUSION,) if early_fusion else self.modalities
        in_channels = 3 * len(self.modalities) if early_fusion else 3
        # Random initial weights will only be overwritten, and must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            self.encoders = self.encoder(len(self.feature_names), in_channels=in_channels)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def of_method(cls, method: IKEM | RelationalDistillation, part: str | None = None) -> FrozenEncoders:
        """A copy of a trainer's encoders, on the CPU.

        Args:
            method: the trainer.
            part: of a distillation ``"student"`` (the default) or ``"teacher"``.
        """
        source, names = evaluated_encoders(method, part)
        early_fusion = names == (EARLY_FUSION,)
        frozen = cls(
            method.layout,
            # What the trainer derives for it, whatever order they were named in.
            method.view_modalities[1] if early_fusion else names,
            hidden_channels=method.hidden_channels,
            feature_size=method.feature_size,
            chest_normal=method.chest_normal,
            early_fusion=early_fusion,
            precision=method.precision,
            quirks=method.quirks,
        )
        state = source.state_dict()
        frozen.encoders.load_state_dict({name: state[name] for name in frozen.encoders.state_dict()})
        return frozen

    def features(self, clips: Tensor, num_frames: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Features (S, N, d) of some of ``feature_names``, by default of all.

        Args:
            clips: (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
            names: the rows.
        """
        names = self.feature_names if names is None else names
        if self.early_fusion:
            return self.encoders.features(fuse_early(encoder_input(self.derive(clips, num_frames))))
        streams = [self.feature_names.index(name) for name in names]
        return self.encoders.of_streams(encoder_input(self.derive(clips, num_frames, names)), streams)

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain values; ``from_config`` builds the same module again."""
        return {
            "layout": self.layout.to_dict(),
            "modalities": list(self.modalities),
            "hidden_channels": self.hidden_channels,
            "feature_size": self.feature_size,
            "chest_normal": self.chest_normal,
            "early_fusion": self.early_fusion,
            "precision": self.precision,
            "quirks": self.quirks.to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FrozenEncoders:
        """Encoders of the sizes in ``config`` (see ``config()``), their weights still to be loaded."""
        arguments = {key: value for key, value in config.items() if key not in ("layout", "quirks")}
        return cls(layout_from_dict(config["layout"]), **arguments, quirks=Quirks(**config["quirks"]))
