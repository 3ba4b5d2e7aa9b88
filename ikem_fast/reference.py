"""Checkpoints of the authors' release: read into our modules, and written in the release's names.

Only the names are translated. Which release name a tensor of ours has is computed from our modules, so reading and
writing share one table, and a checkpoint is accepted only if its keys and shapes are exactly the expected ones.
"""

from __future__ import annotations

import difflib
import inspect
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ikem_fast import layouts
from ikem_fast.archives import check_archive
from ikem_fast.evaluation.linear_classifier import LinearClassifier
from ikem_fast.layouts import Layout
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.methods.distillation import EARLY_FUSION
from ikem_fast.nn import MultiStreamSTGCN
from ikem_fast.quirks import Quirks
from ikem_fast.tensors import list_differences, listed

# Our modality → the release's suffix of encoders and queues, and its letter for heads and students.
_NAMES = {
    "joint": ("", "j"),
    "motion": ("_motion", "m"),
    "bone": ("_bone", "b"),
    "acceleration": ("_acceleration", "a"),
    "rotation_axis": ("_rotation_axis", "r"),
    "angular_velocity": ("_omega", "o"),
}
_ENCODER_NAMES = (
    (r"adjacency", r"A"),
    (r"input_norm\.(.+)", r"data_bn.\1"),
    (r"blocks\.(\d+)\.importance", r"edge_importance.\1"),
    (r"blocks\.(\d+)\.graph_conv\.(.+)", r"st_gcn_networks.\1.gcn.conv.\2"),
    (r"blocks\.(\d+)\.graph_norm\.(.+)", r"st_gcn_networks.\1.tcn.0.\2"),
    (r"blocks\.(\d+)\.temporal_conv\.(.+)", r"st_gcn_networks.\1.tcn.2.\2"),
    (r"blocks\.(\d+)\.temporal_norm\.(.+)", r"st_gcn_networks.\1.tcn.3.\2"),
    (r"blocks\.(\d+)\.residual\.(.+)", r"st_gcn_networks.\1.residual.\2"),
    (r"head\.(.+)", r"fc.\1"),
)

_GRAPH_TOLERANCE = 1e-6


class ReferenceCheckpointError(ValueError):
    """A released checkpoint that does not hold exactly what its kind of module needs."""


def reference_encoder_name(name: str, *, single_head: bool = False) -> str:
    """The release's name for a tensor of ``STGCNReference.state_dict()``."""
    if single_head and name.startswith("head.0."):
        return name.replace("head.0.", "fc.")
    for pattern, replacement in _ENCODER_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(f"no release name for encoder tensor '{name}'")


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Our tensors under their release names. The release keeps one queue pointer a modality, all equal."""
    named: dict[str, Tensor] = {}

    def add_encoder(prefix: str, encoders: MultiStreamSTGCN, stream: int, *, single_head: bool = False) -> None:
        for name, tensor in encoders.stream_tensors(stream).items():
            named[f"{prefix}.{reference_encoder_name(name, single_head=single_head)}"] = tensor

    if isinstance(module, LinearClassifier):
        for index, name in enumerate(module.modalities):
            add_encoder(f"encoder_q{_NAMES[name][0]}", module.encoders, index, single_head=True)
        return named
    for index, name in enumerate(module.modalities):
        suffix, letter = _NAMES[name]
        named[f"queue{suffix}"] = module.queue[index]
        named[f"queue_ptr{suffix}"] = module.queue_pointer
        if isinstance(module, IKEM):
            add_encoder(f"encoder_q{suffix}", module.query_encoders, index)
            add_encoder(f"encoder_k{suffix}", module.key_encoders, index)
            for key, tensor in module.exchange_heads.state_dict().items():
                named[f"mlp2{letter}.{key}"] = tensor[index]
        else:
            add_encoder(f"encoder_q{suffix}", module.teacher_encoders, index)
    if isinstance(module, RelationalDistillation):
        named["queue_teacher"] = module.teacher_queue
        named["queue_ptr_teacher"] = module.teacher_queue_pointer
        for index, name in enumerate(module.feature_names):
            prefix = "encoder_student" if name == EARLY_FUSION else f"encoder_student_{_NAMES[name][1]}"
            add_encoder(prefix, module.student_encoders, index)
    return named


def to_reference(module: IKEM | RelationalDistillation | LinearClassifier) -> dict[str, Tensor]:
    """The module's tensors as a flat state dict with the release's names, detached copies on the CPU.

    Source: docs/method.md section 9.
    """
    unknown = [name for name in module.modalities if name not in _NAMES]
    if unknown:
        raise ValueError(f"the release has no names for {', '.join(unknown)}")
    return {name: tensor.detach().cpu().clone() for name, tensor in _module_tensors(module).items()}


def _read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        state, where = source, "state dict"
    else:
        where = str(source)
        if not Path(source).is_file():
            raise ReferenceCheckpointError(f"{where}: no such file")
        try:
            if zipfile.is_zipfile(source):
                check_archive(source)
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint fail in as many ways as there are bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ReferenceCheckpointError(f"{where}: not a readable checkpoint: {reason}") from None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ReferenceCheckpointError(f"{where}: expected a flat dict of tensors")
    return {str(key): value for key, value in state.items()}


def _require(state: Mapping[str, Tensor], key: str, dims: int) -> Tensor:
    """A tensor that a size is read from."""
    if key not in state:
        raise ReferenceCheckpointError(f"missing {key}")
    if state[key].dim() != dims:
        raise ReferenceCheckpointError(f"{key} must have {dims} dimensions, got {tuple(state[key].shape)}")
    return state[key]


def _infer_layout(adjacency: Tensor, one_hop: bool, wanted: str | Layout | None) -> Layout:
    candidates = [layouts.get(wanted)] if wanted is not None else [layouts.get(name) for name in layouts.names()]
    for layout in candidates:
        if layout.num_joints == adjacency.shape[-1]:
            expected = layout.adjacency(distance_limit=1 if one_hop else None)
            if torch.allclose(expected, adjacency.float(), atol=_GRAPH_TOLERANCE):
                return layout
    names = ", ".join(f"'{layout.name}'" for layout in candidates)
    raise ReferenceCheckpointError(
        f"encoder_q.A {tuple(adjacency.shape)} is not the graph of layout {names}; give the right one as layout="
    )


def _sizes(state: Mapping[str, Tensor], encoder: str) -> dict[str, int]:
    return {
        "hidden_channels": _require(state, f"{encoder}.st_gcn_networks.0.gcn.conv.weight", 4).shape[0] // 3,
        "feature_size": _require(state, f"{encoder}.st_gcn_networks.9.gcn.conv.weight", 4).shape[0] // 3,
    }


def _contrast_sizes(state: Mapping[str, Tensor], suffix: str) -> dict[str, int]:
    embedding_size, queue_size = _require(state, f"queue{suffix}", 2).shape
    return {"embedding_size": embedding_size, "queue_size": queue_size}


def load_reference(
    path_or_state_dict: str | Path | Mapping[str, Tensor], *, fidelity: str = "release", **overrides: Any
) -> IKEM | RelationalDistillation | LinearClassifier:
    """The module of the right kind from a checkpoint of the authors' release, in training mode but for a classifier.

    Kind, modalities and every size are read off the tensors.

    Args:
        path_or_state_dict: a file, or the flat state dict in it.
        fidelity: ``"release"`` behaves as the release does (all quirks on), ``"default"`` with our defaults.
        overrides: arguments of the module that the tensors do not tell, such as ``dropout``, ``temperature``,
            ``topk``, ``momentum``, ``layout``, or ``quirks`` for single ones.

    Raises:
        ReferenceCheckpointError: the file is unreadable, or a key is missing, unexpected or of the wrong shape;
            the message lists them.

    Source: docs/method.md section 9.
    """
    quirks = overrides.pop("quirks", None) or Quirks.of_fidelity(fidelity)
    state = _read(path_or_state_dict)
    modalities = tuple(name for name, (suffix, _) in _NAMES.items() if f"encoder_q{suffix}.A" in state)
    if not modalities:
        raise ReferenceCheckpointError("missing encoder_q.A: no encoder of the release is in this checkpoint")
    suffix = _NAMES[modalities[0]][0]
    encoder = f"encoder_q{suffix}"
    adjacency = _require(state, f"{encoder}.A", 3)
    arguments: dict[str, Any] = {
        "layout": _infer_layout(adjacency, quirks.one_hop_graph, overrides.pop("layout", None)),
        "modalities": modalities,
        "quirks": quirks,
        **_sizes(state, encoder),
    }
    kind: Callable[..., IKEM | RelationalDistillation | LinearClassifier]
    if any(key.startswith("encoder_student") for key in state):
        kind = RelationalDistillation
        students = tuple(name for name, (_, letter) in _NAMES.items() if f"encoder_student_{letter}.A" in state)
        arguments.update(_contrast_sizes(state, suffix))
        if students:
            arguments["student_modalities"] = students
    elif any(key.startswith(("encoder_k", "queue")) for key in state):
        kind = IKEM
        arguments.update(_contrast_sizes(state, suffix))
    else:
        kind = LinearClassifier
        arguments["num_classes"] = _require(state, f"{encoder}.fc.weight", 2).shape[0]
    _check_overrides(kind, overrides, arguments)
    module = kind(**(arguments | overrides))
    _copy_exactly(module, state)
    return module


def _check_overrides(kind: Callable, overrides: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    choices = [name for name in inspect.signature(kind).parameters if name not in inferred] + ["layout", "quirks"]
    for name in overrides:
        if name not in choices:
            close = difflib.get_close_matches(name, choices, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            known = "is read off the checkpoint" if name in inferred else "is no override"
            raise ValueError(f"{name} {known}; overrides are {', '.join(choices)}{hint}")


@torch.no_grad()
def _copy_exactly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies every tensor; the keys and shapes must be exactly the module's."""
    expected = _module_tensors(module)
    problems = list_differences(expected, state)
    if not problems:
        problems = [f"{key} must be finite" for key, tensor in state.items() if not tensor.isfinite().all()]
    if problems:
        raise ReferenceCheckpointError(f"checkpoint does not fit {type(module).__name__}: {listed(problems)}")
    for key, tensor in expected.items():
        if key.endswith(".A") and not torch.allclose(tensor, state[key].float(), atol=_GRAPH_TOLERANCE):
            raise ReferenceCheckpointError(f"{key} is not the graph of layout '{module.layout.name}'")
    _check_pointers({key: int(state[key]) for key in expected if key.startswith("queue_ptr")}, module)
    for key, tensor in expected.items():
        tensor.copy_(state[key])


def _check_pointers(pointers: Mapping[str, int], module: nn.Module) -> None:
    if len(set(pointers.values())) > 1:
        raise ReferenceCheckpointError(f"queue pointers must agree, got {pointers}")
    for pointer in pointers.values():
        if not 0 <= pointer < module.queue_size:
            raise ReferenceCheckpointError(f"queue pointers must be in 0 ... {module.queue_size - 1}, got {pointer}")
