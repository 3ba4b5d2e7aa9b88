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
from ikem_fast.layouts import get as get_layout
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
    """A module that turns clips into modalities.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the modalities, in the order of the streams.
        quirks: which behaviours of the release apply.
    """

    def __init__(self, layout: str | Layout, modalities: Iterable[str], quirks: Quirks) -> None:
        super().__init__()
        self.layout = get_layout(layout)
        self.modalities = check_modalities(modalities)
        self.quirks = quirks

    def adjacency(self) -> Tensor:
        return self.layout.adjacency(distance_limit=1 if self.quirks.one_hop_graph else None)

    def derive(self, clips: Tensor, num_frames: Tensor, modalities: Iterable[str] | None = None) -> Tensor:
        """The modalities (S, N, 3, T, V, M) of clips (N, 3, T, V, M) of ``num_frames`` (N,) recorded frames."""
        return ops.derive_modalities(
            clips,
            num_frames,
            self.layout,
            tuple(modalities or self.modalities),
            chest_normal=not leaves_chest_normal_out(self.quirks, self.modalities),
        )


def config_arguments(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Constructor arguments from the plain values of ``module.config()``."""
    if config.get("method") != method:
        raise ValueError(f"config['method'] must be '{method}', got {config.get('method')!r}")
    arguments = {key: value for key, value in config.items() if key != "method"}
    arguments["quirks"] = Quirks(**config["quirks"])
    return arguments
