"""What both trainers share: the modalities they derive and the queues they fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ikem_fast import modalities as modality_registry
from ikem_fast import ops
from ikem_fast.layouts import Layout
from ikem_fast.layouts import from_dict as layout_from_dict
from ikem_fast.layouts import get as get_layout
from ikem_fast.nn import STGCN
from ikem_fast.quirks import Quirks

THREE_MODALITIES = ("joint", "motion", "bone")


def check_modalities(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; raises unless they are known, distinct and at least one."""
    names = tuple(names)
    if not names:
        raise ValueError("modalities must name at least one modality, got none")
    for name in names:
        modality_registry.get(name)
    if len(set(names)) != len(names):
        raise ValueError(f"modalities must be distinct, got {', '.join(names)}")
    return names


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def leaves_chest_normal_out(quirks: Quirks, modalities: Iterable[str]) -> bool:
    """Whether the three-modality variant of the release applies (quirk Q4)."""
    return quirks.early_fusion_student and set(modalities) == set(THREE_MODALITIES)


def random_queue(*shape: int) -> Tensor:
    """Random keys, unit columns: (..., D, K)."""
    return functional.normalize(torch.randn(*shape), dim=-2)


class ModalityModule(nn.Module):
    """A module that turns clips into modalities and encodes them.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the modalities, in the order of the streams.
        quirks: which behaviours of the release apply.
    """

    hidden_channels: int
    feature_size: int
    dropout: float

    def __init__(self, layout: str | Layout, modalities: Iterable[str], quirks: Quirks) -> None:
        super().__init__()
        self.layout = get_layout(layout)
        self.modalities = check_modalities(modalities)
        self.quirks = quirks

    def encoder(self, *head_sizes: int, in_channels: int = 3) -> STGCN:
        """A freshly initialised encoder of the module's sizes with a head."""
        return STGCN(
            self.layout.adjacency(distance_limit=1 if self.quirks.one_hop_graph else None),
            in_channels=in_channels,
            hidden_channels=self.hidden_channels,
            feature_size=self.feature_size,
            head_sizes=head_sizes,
            dropout=self.dropout,
        )

    def derive(self, clips: Tensor, num_frames: Tensor, modalities: Iterable[str] | None = None) -> Tensor:
        """The modalities (S, N, 3, T, V, M) of clips (N, 3, T, V, M) of ``num_frames`` (N,) recorded frames."""
        return ops.derive_modalities(
            clips,
            num_frames,
            self.layout,
            tuple(modalities or self.modalities),
            chest_normal=not leaves_chest_normal_out(self.quirks, self.modalities),
        )


class Trainer(ModalityModule):
    """A module with queues that is trained by ``training_losses`` and rebuilt from ``config()``.

    Subclasses name themselves in ``method`` and their constructor's arguments, other than layout and quirks, in
    ``config_fields``; each is kept as the attribute of its name.
    """

    method: str
    config_fields: tuple[str, ...]
    embedding_size: int
    queue_size: int
    temperature: float
    topk: int
    queue: Tensor
    queue_pointer: Tensor

    def make_queues(self) -> None:
        """The modalities' queues of random keys (S, D, K) and their common pointer; checks the sizes."""
        check_sizes(embedding_size=self.embedding_size, queue_size=self.queue_size)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 1 <= self.topk <= self.queue_size:
            raise ValueError(f"topk must be in 1 ... queue_size = {self.queue_size}, got {self.topk}")
        self.register_buffer("queue", random_queue(len(self.modalities), self.embedding_size, self.queue_size))
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain values; ``from_config`` builds the same module again."""
        values = {name: getattr(self, name) for name in self.config_fields}
        return {
            "method": self.method,
            "layout": self.layout.to_dict(),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "quirks": self.quirks.to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Trainer:
        """A freshly initialised module of the sizes in ``config`` (see ``config()``)."""
        if config.get("method") != cls.method:
            raise ValueError(f"config['method'] must be '{cls.method}', got {config.get('method')!r}")
        arguments = {key: value for key, value in config.items() if key not in ("method", "layout", "quirks")}
        return cls(layout_from_dict(config["layout"]), **arguments, quirks=Quirks(**config["quirks"]))


def embed(encoders: nn.ModuleDict, views: Iterable[Tensor]) -> Tensor:
    """Unit embeddings (S, N, D) of one view per encoder."""
    outputs = [encoder(x) for encoder, x in zip(encoders.values(), views, strict=True)]
    return functional.normalize(torch.stack(outputs), dim=2)


def encode(encoders: nn.ModuleDict, views: Iterable[Tensor]) -> Tensor:
    """Features (S, N, d) of one view per encoder."""
    return torch.stack([encoder.features(x) for encoder, x in zip(encoders.values(), views, strict=True)])


def project(heads: Iterable[nn.Module], features: Tensor) -> Tensor:
    """Unit outputs (S, N, D) of one head per row of features (S, N, d)."""
    return functional.normalize(torch.stack([head(f) for head, f in zip(heads, features, strict=True)]), dim=2)
