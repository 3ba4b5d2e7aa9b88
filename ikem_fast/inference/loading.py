"""From a run or a file to a model, and from a model to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ikem_fast import safetensors_file
from ikem_fast.data import ClipSet, DataError
from ikem_fast.data.preparation import Preparation
from ikem_fast.engine import checkpoints
from ikem_fast.evaluation.heads import HEADS_FILE, LinearHeads, load_heads
from ikem_fast.inference.encoders import FrozenEncoders
from ikem_fast.inference.model import Model, ModelError
from ikem_fast.methods import IKEM
from ikem_fast.nn.precision import check_precision
from ikem_fast.safetensors_file import TensorFileError

_KIND = "ikem_fast model"
_VERSION = 1
_PRETRAINED = "pretrained"
_DISTILLED = ("student", "teacher")


def load(
    source: str | Path,
    *,
    part: str | None = None,
    data: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: str | None = None,
) -> Model:
    """A trained model, ready for use.

    Args:
        source: folder of a pretraining or distillation run, or a file of ``python -m ikem_fast.export``.
        part: of a distillation run ``"student"`` (the default) or ``"teacher"``; of a pretraining run
            ``"pretrained"``, and of a file what it holds.
        data: prepared data set whose preparation recordings get. Only needed for runs of versions that did not keep
            it, once the folder they were trained on is gone.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``; by default as in the run.

    Raises:
        CheckpointError: the folder holds no run, or its checkpoint is damaged.
        TensorFileError: the file is damaged or no exported model.
        ModelError: the run or file has no such part, or its heads do not fit it.
        DataError: ``data`` is no prepared data set, or was prepared otherwise than the model's.
        ConfigError: there is no such device.
    """
    source = Path(source)
    if precision is not None:
        check_precision(precision)
    model = _of_run(source, part, precision) if source.is_dir() else _of_file(source, part, precision)
    if data is not None:
        _take_preparation(model, ClipSet.open(data))
    return model.to(device)


def _take_preparation(model: Model, clip_set: ClipSet) -> None:
    given = Preparation.of_clips(clip_set)
    if clip_set.layout != model.layout:
        raise DataError(f"{clip_set.folder} must have the model's skeleton '{model.layout.name}', got another")
    different = [] if model.preparation is None else model.preparation.differences(given)
    if different:
        raise DataError(f"{clip_set.folder} must be prepared as the model's data set: {', '.join(different)}")
    model.preparation = given


def _of_run(folder: Path, part: str | None, precision: str | None) -> Model:
    method, checkpoint = checkpoints.load_run(folder)
    if precision is not None:
        method.precision = precision
    parts = (_PRETRAINED,) if isinstance(method, IKEM) else _DISTILLED
    part = _check_part(part, parts, f"run {folder}")
    preparation = Preparation.of_run(checkpoint["data"])
    origin = {
        "run": {"kind": checkpoint["kind"], "epoch": checkpoint["epoch"], "step": checkpoint["step"]},
        "part": part,
        "config": checkpoint["config"],
        "versions": checkpoint["versions"],
    }
    encoders = FrozenEncoders.of_method(method, part)
    path = folder / "evaluation" / HEADS_FILE
    if not path.is_file():
        return Model(encoders, preparation, None, origin, f"run {folder} was not evaluated")
    of_parts = load_heads(path)
    if part not in of_parts:
        return Model(encoders, preparation, None, origin, f"{path} has no heads for '{part}'")
    heads = of_parts[part]
    problem = _misfit(heads, encoders, preparation, checkpoint["step"])
    if problem:
        return Model(encoders, preparation, None, origin, f"{path} is of no use: {problem}")
    return Model(encoders, preparation, heads, origin)


def _misfit(heads: LinearHeads, encoders: FrozenEncoders, preparation: Preparation | None, step: int) -> str | None:
    """Why heads must not be put on encoders."""
    if heads.training.get("step") != step:
        return f"its heads were trained at step {heads.training.get('step')}, the run is at step {step}"
    size = encoders.feature_size
    for view, names in heads.views.items():
        if not set(names) <= set(encoders.feature_names) or heads.weights[view].shape[2] != size:
            return (
                f"its view '{view}' does not fit encoders of {', '.join(encoders.feature_names)} with {size} features"
            )
    data = heads.training.get("data") or {}
    if preparation is not None and "preparation" in data:
        different = preparation.differences(Preparation.from_dict(data["preparation"]))
        if different:
            return f"its heads were trained on clips that were prepared otherwise: {', '.join(different)}"
    return None


def _check_part(part: str | None, parts: tuple[str, ...], what: str) -> str:
    if part is not None and part not in parts:
        raise ModelError(f"part of {what} must be {' or '.join(map(repr, parts))}, got {part!r}")
    return part or parts[0]


def save_model(model: Model, path: str | Path) -> None:
    """Writes a model as one safetensors file that ``load`` reads, atomically: encoders, heads, preparation, origin."""
    tensors = {f"encoders.{name}": tensor for name, tensor in model.encoders.encoders.state_dict().items()}
    description: dict[str, Any] = {
        "encoders": model.encoders.config(),
        "preparation": model.preparation.to_dict() if model.preparation else None,
        "origin": model.origin,
        "heads": None,
    }
    if model.heads is not None:
        tensors |= {f"heads.{name}": tensor for name, tensor in model.heads.tensors().items()}
        description["heads"] = model.heads.description()
    safetensors_file.write(path, _KIND, _VERSION, tensors, description)


def _of_file(path: Path, part: str | None, precision: str | None) -> Model:
    if not path.exists():
        raise ModelError(f"{path} is neither the folder of a run nor an exported model: it does not exist")
    tensors, description = safetensors_file.read(path, _KIND, _VERSION)
    try:
        config = {**description["encoders"]}
        if precision is not None:
            config["precision"] = precision
        encoders = FrozenEncoders.from_config(config)
        encoders.encoders.load_state_dict(_below("encoders.", tensors))
        preparation = description["preparation"]
        heads = description["heads"]
        model = Model(
            encoders,
            None if preparation is None else Preparation.from_dict(preparation),
            None if heads is None else LinearHeads.restore(heads, _below("heads.", tensors)),
            description["origin"],
            f"{path} was exported without linear heads",
        )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise TensorFileError(f"{path} does not fit its own description: {reason}") from error
    _check_part(part, (str(model.origin.get("part")),), str(path))
    return model


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
