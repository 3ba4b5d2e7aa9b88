"""A trained model in plain PyTorch: what an exported file of Python holds and what the ONNX export traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ikem_fast.evaluation.heads import mean_logits
from ikem_fast.layouts import Layout
from ikem_fast.nn.stgcn_reference import STGCNReference


class PlainModel(nn.Module):
    """Encoders of one modality each and linear heads on their features.

    Args:
        layout: the skeleton of the clips, with V joints.
        modalities: by name the function that derives each of the S modalities from joint coordinates.
        hidden_channels: h of the encoders.
        feature_size: d of the encoders.
        views: by name the modalities whose logits a view averages, the fullest view last; empty for no heads.
        num_classes: number of actions; 0 for no heads.
        chest_normal: whether the root's bone is the chest normal, or zero.
        early_fusion: one encoder that is fed the channels of all modalities, in place of one encoder each.
        distance_limit: of the encoders' graph, see ``Layout.adjacency``.
    """

    def __init__(
        self,
        layout: Layout,
        modalities: Mapping[str, Callable[..., Tensor]],
        *,
        hidden_channels: int,
        feature_size: int,
        views: Mapping[str, Sequence[str]],
        num_classes: int,
        chest_normal: bool = True,
        early_fusion: bool = False,
        distance_limit: int | None = 1,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.modalities = dict(modalities)
        self.chest_normal = chest_normal
        self.early_fusion = early_fusion
        self.feature_names = ("early_fusion",) if early_fusion else tuple(modalities)
        self.views = {view: tuple(names) for view, names in views.items()}
        self.encoders = nn.ModuleList(
            STGCNReference(
                layout.adjacency(distance_limit),
                in_channels=3 * len(self.modalities) if early_fusion else 3,
                hidden_channels=hidden_channels,
                feature_size=feature_size,
            )
            for _ in self.feature_names
        )
        sizes = [(len(names), num_classes) for names in self.views.values()]
        self.weights = nn.ParameterList(torch.zeros(*size, feature_size) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(*size) for size in sizes)
        self.requires_grad_(False)
        self.eval()

    def features(self, clips: Tensor, num_frames: Tensor) -> Tensor:
        """Features (S, N, d), one row for each of ``feature_names``.

        Args:
            clips: (N, 3, T, V, M) prepared clips, zero where a person is absent.
            num_frames: (N,) frames of each recording before it was resampled to T.
        """
        derived = [
            derive(clips, num_frames, self.layout, chest_normal=self.chest_normal)
            for derive in self.modalities.values()
        ]
        if self.early_fusion:
            derived = [torch.cat(derived, dim=1)]
        return torch.stack([encoder.features(x) for encoder, x in zip(self.encoders, derived, strict=True)])

    def logits(self, features: Tensor, view: str | None = None) -> Tensor:
        """Logits (N, classes) of features (S, N, d), the mean over the modalities of a view, by default the fullest."""
        if not self.views:
            raise ValueError("the model has no linear heads, so it gives features alone")
        names = list(self.views)
        view = names[-1] if view is None else view
        if view not in names:
            raise ValueError(f"view must be one of {', '.join(names)}, got {view!r}")
        rows = [self.feature_names.index(name) for name in self.views[view]]
        number = names.index(view)
        return mean_logits(features[rows], self.weights[number], self.biases[number])

    def forward(self, clips: Tensor, num_frames: Tensor, view: str | None = None) -> tuple[Tensor, ...]:
        """Features (S, N, d), and logits (N, classes) of a view where there are heads."""
        features = self.features(clips, num_frames)
        return (features, self.logits(features, view)) if self.views else (features,)
