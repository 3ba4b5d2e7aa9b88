"""The configuration of every command: typed sections, YAML presets and ``key=value`` overrides.

One file serves all commands. ``model``, ``augmentation``, ``fidelity`` and ``quirks`` describe the method;
``pretrain``, ``distill`` and ``linear``, ``knn``, ``finetune``, ``semi`` and ``retrieval`` the recipe of the command of
that name, ``evaluation`` what all evaluations have in common; ``storage`` says where clips lie in training,
``distributed`` how processes share a run, ``logging`` what a run writes down. A file need only give what differs from
the defaults below (the published recipe) or from the preset or file that its ``base`` names.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ikem_fast import modalities as modality_registry
from ikem_fast.atomic import atomic_open
from ikem_fast.data.sources import PLACES
from ikem_fast.modalities import MODALITIES
from ikem_fast.nn.precision import PRECISIONS
from ikem_fast.ops.augment import AugmentationConfig as AugmentationSettings
from ikem_fast.quirks import Quirks
from ikem_fast.yaml_size import check_size

_PRESET_FOLDER = Path(__file__).parent.parent / "presets"
DEFAULT_PRESET = "ntu60-xsub"
EVALUATION_SECTIONS = ("linear", "knn", "finetune", "semi", "retrieval")
COMMANDS = ("pretrain", "distill", *EVALUATION_SECTIONS)
_SCHEDULED_SECTIONS = ("pretrain", "distill", "linear", "finetune", "semi")
BATCH_STATISTICS = ("synchronised", "per_rank")
QUEUES = ("whole", "sharded")


_LARGEST = math.ldexp(1, 63)  # numbers are below it, as what follows keeps them in 64 bits
# What yaml and OmegaConf raise for text they cannot read: ValueError for a date or number that is none, TypeError and
# AttributeError for keys they cannot use.
_NOT_YAML = (
    *(yaml.YAMLError, OmegaConfBaseException, OSError),
    *(ValueError, TypeError, AttributeError, RecursionError, OverflowError),
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key, what is expected and what came."""


@dataclass
class ModelConfig:
    """The encoders and the contrast (docs/method.md sections 3 to 6)."""

    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    hidden_channels: int = 16  # channels of the first encoder block; the last inner blocks have four times as many
    feature_size: int = 256  # channels of the last block, the feature that evaluation uses
    embedding_size: int = 128  # channels after the head, where the contrast takes place
    queue_size: int = 32768  # negatives kept per modality
    temperature: float = 0.07
    momentum: float = 0.999  # of the key encoders
    topk: int = 1  # mined positives of the context exchange
    dropout: float = 0.5
    context: bool = True  # stage 2: context exchange between every ordered pair of modalities
    exchange: bool = True  # stage 2: implicit exchange through the concatenated keys
    momentum_buffers: bool = False  # key encoders' running statistics follow by momentum, not from their own batches
    precision: str = "fp32"  # bf16: activations and products in bfloat16; auto: where the device has it


@dataclass
class AugmentationConfig:
    """What turns a clip into a view (docs/method.md section 2)."""

    crop_padding_ratio: int = 6  # a sixth of the clip is mirrored at both ends before the crop; 0 = no crop
    shear: float = 0.5  # amplitude; 0 = no shear
    camera_view: float = 0.0  # amplitude of a random scale and rotation; 0 = off, as published
    motion_scale: bool = False


@dataclass
class StorageConfig:
    """Where the training clips lie during a run."""

    place: str = "auto"  # resident = on the device, stream = read ahead from the file, auto = by size; same results
    dtype: str = "float32"  # float16 halves the space and rounds coordinates to a millimetre at two metres


@dataclass
class DistributedConfig:
    """How processes that ``torchrun`` starts share a run (docs/distributed.md)."""

    batch_statistics: str = "synchronised"  # over the clips of all processes; per_rank = over each one's own
    queue: str = "whole"  # on every process; sharded = each keeps an equal part of the columns; same results
    timeout_minutes: float = 10.0  # a process that does not take part in a step for so long is given up


@dataclass
class QuirksConfig:
    """Where paper and release differ (docs/method.md); null leaves the choice to ``fidelity``."""

    partial_momentum_update: bool | None = None  # Q1
    bone_queue_for_angular_velocity: bool | None = None  # Q2
    teacher_in_training_mode: bool | None = None  # Q3
    early_fusion_student: bool | None = None  # Q4
    rederive_evaluation_features: bool | None = None  # Q5
    file_frame_count: bool | None = None  # Q6
    redraw_key_weights: bool | None = None  # Q7
    best_epoch_on_test: bool | None = None  # Q8
    one_hop_graph: bool | None = None  # Q9


@dataclass
class PretrainConfig:
    """Recipe of ``pretrain`` (docs/method.md sections 5, 6 and 8)."""

    epochs: int = 300
    cross_epoch: int | None = 151  # first epoch of stage 2; null = stage 1 throughout
    batch_size: int = 128  # clips of a step, on all processes together
    accumulate_steps: int = 1  # parts that a process takes its clips of a step in; each has batch statistics of its own
    learning_rate: float = 0.1
    reference_batch_size: int | None = None  # the rate is for this batch size, and grows with batch_size; null = as is
    milestones: list[int] = field(default_factory=lambda: [250])  # the rate falls after each of these epochs
    gamma: float = 0.1  # by this factor
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    max_gradient_norm: float | None = None  # of each modality; longer ones are shortened; null = never, as published


@dataclass
class DistillConfig:
    """Recipe of ``distill`` (docs/method.md sections 7 and 8)."""

    epochs: int = 150
    batch_size: int = 128
    accumulate_steps: int = 1
    learning_rate: float = 0.1
    reference_batch_size: int | None = None
    milestones: list[int] = field(default_factory=lambda: [125])
    gamma: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    max_gradient_norm: float | None = None
    student_modalities: list[str] = field(default_factory=lambda: ["joint", "motion", "bone"])
    queue_size: int | None = None  # null = as long as the teacher's
    temperature: float = 0.07
    topk: int = 1
    dropout: float = 0.5


@dataclass
class EvaluationConfig:
    """What all evaluations have in common."""

    seeds: Any = 1  # so many evaluation seeds, from ``seed`` on; or a list of them


@dataclass
class LinearConfig:
    """Recipe of ``evaluate linear`` (docs/method.md section 8)."""

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 3.0
    milestones: list[int] = field(default_factory=lambda: [80])
    gamma: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 0.0
    feature_batch_size: int = 256  # clips at a time through the frozen encoders
    # Of joint, motion and bone where heads that were trained apart are fused; taken as they are, not normalised.
    fusion_weights: list[float] = field(default_factory=lambda: [0.6, 0.6, 0.4])


@dataclass
class KnnConfig:
    """Settings of ``evaluate knn``: cosine similarity, the vote of the k nearest training clips."""

    k: list[int] = field(default_factory=lambda: [1, 5, 20])
    feature_batch_size: int = 256


@dataclass
class FinetuneConfig:
    """Recipe of ``evaluate finetune``: encoders and a linear head each, trained on all training clips."""

    epochs: int = 100
    batch_size: int = 128  # with fewer clips every step takes them all
    learning_rate: float = 0.1  # of encoders and heads
    milestones: list[int] = field(default_factory=lambda: [80])
    gamma: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    dropout: float | None = None  # of the encoders; null = as in pretraining
    augment: bool = True  # clips are augmented as section ``augmentation`` says; false = clips as they are
    fusion_weights: list[float] = field(default_factory=lambda: [0.6, 0.6, 0.4])  # of joint, motion and bone
    test_every_epochs: int = 10  # how often the test clips are looked at on the way; 0 = only after the last epoch
    feature_batch_size: int = 256  # test clips at a time


@dataclass
class SemiConfig(FinetuneConfig):
    """Recipe of ``evaluate semi``: as ``finetune``, on some of the labels."""

    fractions: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1])  # of each class's training clips
    frozen: bool = False  # true: encoders stay as they are, and only heads are trained, by the recipe of ``linear``


@dataclass
class RetrievalConfig:
    """Settings of ``evaluate retrieval``: clips of the query's class, found by cosine similarity."""

    gallery: str = "train"  # where test clips are looked for: "train" clips, or the other "test" clips
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    feature_batch_size: int = 256


@dataclass
class LoggingConfig:
    """What a run writes down and how often; none of it changes the training."""

    log_every_steps: int = 10  # losses are read back from the device this often
    knn_every_epochs: int = 10  # 0 = never
    knn_max_clips: int = 8192  # at most so many training and so many test clips, evenly spaced; 0 = all
    save_every_epochs: int = 1  # checkpoints/last.pt
    keep_every_epochs: int = 50  # checkpoints/epoch-XXXX.pt, which stay; 0 = never
    tensorboard: bool = True


@dataclass
class Config:
    """The whole configuration."""

    seed: int = 0
    max_steps: int | None = None  # ends any run after so many steps in all
    device: str = "auto"  # auto = the CUDA device if there is one, else cpu
    threads: int | None = None  # CPU threads; null = torch's own choice
    capture: bool = True  # on CUDA a training step is captured as a graph and replayed; the same results up to rounding
    fidelity: str = "default"  # "release" turns every quirk on
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    quirks: QuirksConfig = field(default_factory=QuirksConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def _leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted path of every value of a section -> its annotated type."""
    leaves = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            leaves.update(_leaf_types(annotation, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = annotation
    return leaves


_LEAVES = _leaf_types(Config)
_SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if f"{f.name}" not in _LEAVES)
_SHARED_SECTIONS = ("model", "augmentation", "storage", "distributed", "quirks", "logging")


# ---- reading ---------------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in _PRESET_FOLDER.glob("*.yaml"))


def preset_title(name: str) -> str:
    """The first comment line of a preset: what it is for."""
    with open(_PRESET_FOLDER / f"{name}.yaml", encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = (), command: str | None = None
) -> Config:
    """Reads, overrides and checks a configuration.

    Args:
        source: name of a preset, path of a YAML file, a nested mapping of plain values (as kept in a checkpoint), or
            None for the default preset ``ntu60-xsub``.
        overrides: ``key=value`` texts. The key is a full path (``pretrain.batch_size``), a path inside the section of
            the running command (``batch_size``), or a last name that is unique (``hidden_channels``); the value is
            YAML (``[joint, bone]``, ``1e-3``, ``null``).
        command: the running command, one of ``COMMANDS``, which short keys refer to first.

    Raises:
        ConfigError: an unknown key (naming the nearest right one), a value of the wrong type or out of range, an
            unknown preset, or a file that is not YAML.

    An override of a section's ``epochs`` moves its ``milestones`` and ``cross_epoch`` in proportion, unless they are
    overridden too: ``epochs=6`` is the whole recipe in short.
    """
    if command is not None and command not in COMMANDS:
        raise ConfigError(f"command must be one of {', '.join(COMMANDS)}, got {command!r}")
    tree = OmegaConf.structured(Config)
    source = DEFAULT_PRESET if source is None else source
    layers = [("the given values", source)] if isinstance(source, Mapping) else _read_with_bases(source)
    for origin, layer in layers:
        for key, value in _flatten(layer, origin):
            _assign(tree, key, value, origin)
    planned = {section: OmegaConf.select(tree, f"{section}.epochs") for section in _SCHEDULED_SECTIONS}
    overridden = set()
    for text in overrides:
        key, value = _parse_override(text, command)
        _assign(tree, key, value, f"override {text!r}")
        overridden.add(key)
    config = _to_config(tree)
    for section, epochs in planned.items():
        if f"{section}.epochs" in overridden:
            _scale_schedule(getattr(config, section), section, epochs, overridden)
    validate(config)
    return config


def _scale_schedule(section: Any, name: str, planned_epochs: int, overridden: set[str]) -> None:
    """Moves the turning points of a schedule of ``planned_epochs`` to the section's own number of epochs."""
    epochs = section.epochs
    if epochs < 1 or epochs == planned_epochs:
        return  # an impossible number is named when the whole is checked
    if f"{name}.milestones" not in overridden:
        moved = {round(milestone * epochs / planned_epochs) for milestone in section.milestones}
        section.milestones = sorted(milestone for milestone in moved if 1 <= milestone < epochs)
    if name == "pretrain" and f"{name}.cross_epoch" not in overridden and (section.cross_epoch or 1) > 1:
        # Both stages have at least an epoch, if there are two.
        stage_1 = max(1, round((section.cross_epoch - 1) * epochs / planned_epochs))
        section.cross_epoch = stage_1 + 1 if stage_1 < epochs else None


def _read_with_bases(source: str | Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The file and the files its ``base`` keys lead to, outermost base first."""
    layers: list[tuple[str, Mapping[str, Any]]] = []
    seen: list[Path] = []
    path = _find(source, Path())
    while True:
        if path in seen:
            chain = " -> ".join(p.name for p in [*seen, path])
            raise ConfigError(f"{path}: base leads back to the file itself: {chain}")
        seen.append(path)
        values = _read_yaml(path)
        base = values.pop("base", None)
        layers.insert(0, (str(path), values))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base must be the name of a preset or of a file, got {base!r}")
        path = _find(base, path.parent)


def _find(source: str | Path, folder: Path) -> Path:
    """A preset's file by its name, or a file by its path (relative to ``folder``)."""
    text = str(source)
    if text in preset_names():
        return (_PRESET_FOLDER / f"{text}.yaml").resolve()
    path = folder / text
    if os.path.isfile(path):  # unlike Path.is_file it takes any text
        return path.resolve()
    if path.suffix in (".yaml", ".yml") or "/" in text:
        raise ConfigError(f"config file {path} does not exist")
    names = preset_names()
    raise ConfigError(f"unknown preset {text!r}{_nearest(text, names)}; presets are {', '.join(names)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        check_size(text)
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=True)
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is no readable YAML file: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top, got a {type(values).__name__}")
    return values


def _flatten(values: Mapping[str, Any], origin: str, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The (dotted path, value) pairs of a nested mapping; unknown paths are errors."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in _LEAVES:
            yield key, value
        elif key in _SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: {key} must be a section with keys of its own, got {value!r}")
            yield from _flatten(value or {}, origin, f"{key}.")
        else:
            near = [k for k in (*_LEAVES, *_SECTIONS) if k.startswith(prefix)] if prefix else [*_LEAVES, *_SECTIONS]
            raise ConfigError(f"{origin}: unknown key {key!r}{_nearest(key, near)}")


def _parse_override(text: str, command: str | None) -> tuple[str, Any]:
    name, equals, value_text = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"override {text!r} must have the form key=value")
    key = _resolve_key(name, command)
    try:
        # A leading dot or colon in the value is YAML's business; only the first "=" separates.
        check_size(value_text)
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value_text}"]), resolve=True)["value"]
    except _NOT_YAML as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {_one_line(error)}") from error
    return key, value


def _resolve_key(name: str, command: str | None) -> str:
    """The full path a short key means: full path, the command's section, the shared sections, then anywhere."""
    if name in _LEAVES:
        return name
    if name in _SECTIONS:
        inside = [key for key in _LEAVES if key.startswith(f"{name}.")]
        raise ConfigError(f"{name} is a section: give one of its keys, such as {inside[0]}=…")
    if command is not None and f"{command}.{name}" in _LEAVES:
        return f"{command}.{name}"
    shared = [f"{section}.{name}" for section in _SHARED_SECTIONS if f"{section}.{name}" in _LEAVES]
    if len(shared) == 1:
        return shared[0]
    anywhere = [key for key in _LEAVES if key.endswith(f".{name}")]
    if len(anywhere) == 1:
        return anywhere[0]
    if anywhere:
        raise ConfigError(f"override key {name!r} could mean {' or '.join(anywhere)}: give the full path")
    own_first = sorted(_LEAVES, key=lambda key: not key.startswith(f"{command}."))
    raise ConfigError(f"override: unknown key {name!r}{_nearest(name, own_first)}")


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """``; did you mean …?`` for a mistyped name, comparing full paths, last names and initials (``lr``)."""
    section, _, given = name.rpartition(".")

    def likeness(candidate: str) -> float:
        last = candidate.rpartition(".")[2]
        initials = "".join(word[0] for word in last.split("_"))
        if len(given) > 1 and given == initials:
            return 0.9 + (0.1 * _ratio(section, candidate.rpartition(".")[0]) if section else 0.0)
        return max(_ratio(name, candidate), _ratio(name, last), 0.95 * _ratio(given, last))

    best = max(candidates, key=likeness, default=None)
    return "" if best is None else f"; did you mean {best!r}?"


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _assign(tree: Any, key: str, value: Any, origin: str) -> None:
    expected = _LEAVES[key]
    if expected is Any:  # ``validate`` looks at it
        OmegaConf.update(tree, key, list(value) if isinstance(value, tuple) else value)
        return
    problem = ConfigError(f"{origin}: {key} must be {_describe(expected)}, got {value!r} ({type(value).__name__})")
    if _is_list(expected) != isinstance(value, (list, tuple)):
        raise problem
    # OmegaConf would turn any number into text and any text that looks like one into a number.
    scalars = list(value) if isinstance(value, (list, tuple)) else [value]
    for scalar in scalars:
        if not _has_type(scalar, _scalar_types(expected)):
            raise problem
        # OmegaConf would put another value in its place.
        if isinstance(scalar, str) and ("${" in scalar or scalar == "???"):
            raise problem
    try:
        OmegaConf.update(tree, key, list(value) if isinstance(value, tuple) else value)
    except (OmegaConfBaseException, OverflowError) as error:
        raise problem from error


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list


def _scalar_types(annotation: Any) -> tuple[type, ...]:
    if _is_list(annotation):
        return _scalar_types(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(typing.get_args(annotation))
    return (annotation,)


def _has_type(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return isinstance(value, allowed)


def _describe(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    kinds = " or ".join(words[kind] for kind in _scalar_types(annotation))
    return f"a list of {kinds.replace('a whole number', 'whole numbers')}" if _is_list(annotation) else kinds


def _to_config(tree: Any) -> Config:
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration cannot be resolved: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- checking --------------------------------------------------------------------------------------------------------


def validate(config: Config) -> None:
    """Raises ConfigError for a value out of range, naming the key, what is expected and what came."""

    def need(key: str, condition: bool, expected: str) -> None:
        if not condition:
            value: Any = config
            for name in key.split("."):
                value = getattr(value, name)
            raise ConfigError(f"{key} must be {expected}, got {value!r}")

    def in_range(key: str, value: float, low: float, high: float = _LARGEST, *, open_low: bool = False) -> None:
        limit = "" if high == _LARGEST and value < high else f" and below {high:g}"
        expected = f"{'above' if open_low else 'at least'} {low:g}{limit}"
        need(key, (value > low if open_low else value >= low) and value < high, expected)

    need("seed", 0 <= config.seed < 2**63, "from 0 to 2**63 - 1")
    if config.max_steps is not None:
        in_range("max_steps", config.max_steps, 1)
    if config.threads is not None:
        in_range("threads", config.threads, 1, 4097)
    need("fidelity", config.fidelity in ("default", "release"), "'default' or 'release'")

    model = config.model
    for key in ("hidden_channels", "feature_size", "embedding_size", "queue_size", "topk"):
        in_range(f"model.{key}", getattr(model, key), 1)
    in_range("model.momentum", model.momentum, 0, 1)
    in_range("model.temperature", model.temperature, 0, open_low=True)
    in_range("model.dropout", model.dropout, 0, 1)
    need("model.precision", model.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    _check_modalities("model.modalities", model.modalities)
    need("model.topk", model.topk <= model.queue_size, f"at most model.queue_size = {model.queue_size}")

    augmentation = config.augmentation
    in_range("augmentation.crop_padding_ratio", augmentation.crop_padding_ratio, 0)
    in_range("augmentation.shear", augmentation.shear, 0)
    in_range("augmentation.camera_view", augmentation.camera_view, 0)

    need("storage.place", config.storage.place in PLACES, f"one of {', '.join(PLACES)}")
    need("storage.dtype", config.storage.dtype in ("float32", "float16"), "float32 or float16")

    distributed = config.distributed
    for key, values in (("batch_statistics", BATCH_STATISTICS), ("queue", QUEUES)):
        need(f"distributed.{key}", getattr(distributed, key) in values, f"one of {', '.join(values)}")
    in_range("distributed.timeout_minutes", distributed.timeout_minutes, 0, 1e6, open_low=True)

    for name in ("pretrain", "distill"):
        section = getattr(config, name)
        in_range(f"{name}.accumulate_steps", section.accumulate_steps, 1)
        need(
            f"{name}.batch_size",
            section.batch_size % section.accumulate_steps == 0,
            f"a multiple of {name}.accumulate_steps = {section.accumulate_steps}",
        )
        if section.reference_batch_size is not None:
            in_range(f"{name}.reference_batch_size", section.reference_batch_size, 1)

    for name in _SCHEDULED_SECTIONS:
        section = getattr(config, name)
        in_range(f"{name}.epochs", section.epochs, 1)
        in_range(f"{name}.batch_size", section.batch_size, 1)
        in_range(f"{name}.learning_rate", section.learning_rate, 0, open_low=True)
        in_range(f"{name}.gamma", section.gamma, 0, open_low=True)
        in_range(f"{name}.sgd_momentum", section.sgd_momentum, 0, 1)
        in_range(f"{name}.weight_decay", section.weight_decay, 0)
        if getattr(section, "max_gradient_norm", None) is not None:
            in_range(f"{name}.max_gradient_norm", section.max_gradient_norm, 0, open_low=True)
        epochs = section.milestones
        need(
            f"{name}.milestones",
            list(epochs) == sorted(set(epochs)) and all(1 <= epoch < section.epochs for epoch in epochs),
            f"increasing epochs below {name}.epochs = {section.epochs} ([] for a constant rate)",
        )
    # A batch longer than the queue would push out part of itself.
    need(
        "model.queue_size",
        model.queue_size >= config.pretrain.batch_size,
        f"at least pretrain.batch_size = {config.pretrain.batch_size}",
    )
    if config.pretrain.cross_epoch is not None:
        need(
            "pretrain.cross_epoch",
            1 <= config.pretrain.cross_epoch <= config.pretrain.epochs,
            f"an epoch from 1 to pretrain.epochs = {config.pretrain.epochs}, or null for stage 1 throughout",
        )
        need(
            "pretrain.cross_epoch",
            len(model.modalities) > 1 or not model.context,
            f"null when {model.modalities[0]} is the only modality: model.context has no partner to mine in",
        )
    need("model.exchange", model.context or model.exchange, "true when model.context is false: stage 2 needs a loss")

    distill = config.distill
    _check_modalities("distill.student_modalities", distill.student_modalities)
    distill_queue = model.queue_size if distill.queue_size is None else distill.queue_size
    if distill.queue_size is not None:
        in_range("distill.queue_size", distill.queue_size, 1)
    fits = distill.batch_size <= distill_queue
    need("distill.batch_size", fits, f"at most the length of the queues, {distill_queue}")
    in_range("distill.topk", distill.topk, 1, distill_queue + 1)
    in_range("distill.temperature", distill.temperature, 0, open_low=True)
    in_range("distill.dropout", distill.dropout, 0, 1)

    for name in EVALUATION_SECTIONS:
        in_range(f"{name}.feature_batch_size", getattr(config, name).feature_batch_size, 1)
    ks = config.knn.k
    need("knn.k", bool(ks) and len(set(ks)) == len(ks) and min(ks) >= 1, "distinct numbers of neighbours, at least 1")
    _check_evaluations(config, need, in_range)
    in_range("logging.log_every_steps", config.logging.log_every_steps, 1)
    in_range("logging.save_every_epochs", config.logging.save_every_epochs, 1)
    for key in ("knn_every_epochs", "knn_max_clips", "keep_every_epochs"):
        in_range(f"logging.{key}", getattr(config.logging, key), 0)

    for key, value in _flatten(to_dict(config), "the configuration"):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                need(key, -_LARGEST < number < _LARGEST, f"below {_LARGEST:g}")


def _check_evaluations(config: Config, need: Callable[..., None], in_range: Callable[..., None]) -> None:
    seeds = config.evaluation.seeds
    numbers = seeds if isinstance(seeds, list) else [seeds]
    are_whole = all(_has_type(seed, (int,)) for seed in numbers)
    if isinstance(seeds, list):
        fits = are_whole and bool(seeds) and len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    else:
        fits = are_whole and seeds >= 1
    need("evaluation.seeds", fits, "a number of seeds, at least 1, or a list of distinct seeds from 0 to 2**63 - 1")
    for name in ("linear", "finetune", "semi"):
        weights = getattr(config, name).fusion_weights
        fits = len(weights) == 3 and all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights)
        need(f"{name}.fusion_weights", fits, "three numbers, of joint, motion and bone, at least 0 and not all 0")
    for name in ("finetune", "semi"):
        section = getattr(config, name)
        if section.dropout is not None:
            in_range(f"{name}.dropout", section.dropout, 0, 1)
        in_range(f"{name}.test_every_epochs", section.test_every_epochs, 0)
    fractions = config.semi.fractions
    fits = bool(fractions) and len(set(fractions)) == len(fractions) and all(0 < each <= 1 for each in fractions)
    need("semi.fractions", fits, "distinct parts of the training clips, above 0 and at most 1")
    retrieval = config.retrieval
    need("retrieval.gallery", retrieval.gallery in ("train", "test"), "'train' or 'test'")
    ks = retrieval.recall_at
    fits = bool(ks) and len(set(ks)) == len(ks) and min(ks) >= 1
    need("retrieval.recall_at", fits, "distinct numbers of found clips, at least 1")


def _check_modalities(key: str, names: list[str]) -> None:
    try:
        modality_registry.check(names, key)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(key) else f"{key}: {message}") from None


# ---- using -----------------------------------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values; ``load_config`` reads them back."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None)


def save_config(config: Config, path: Path, header: str = "") -> None:
    """Writes the resolved configuration as YAML, under comment lines; atomic."""
    with atomic_open(path, "w") as file:
        file.write("".join(f"# {line}\n" for line in header.splitlines()) + to_yaml(config))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Full path -> (old, new) of every value in which two configurations, as plain values, differ.

    What the old one, of an earlier version, does not have yet had the default's effect.
    """
    first = {**dict(_flatten(to_dict(Config()), "")), **dict(_flatten(old, "the old configuration"))}
    second = dict(_flatten(new, "the new configuration"))
    keys = [key for key in _LEAVES if first.get(key) != second.get(key)]
    return {key: (first.get(key), second.get(key)) for key in keys}


def resolve_quirks(config: Config) -> Quirks:
    """The quirks that ``fidelity`` and the single fields amount to."""
    base = Quirks.of_fidelity(config.fidelity)
    given = {name: value for name, value in dataclasses.asdict(config.quirks).items() if value is not None}
    return dataclasses.replace(base, **given)


def augmentation_settings(config: Config) -> AugmentationSettings:
    """The section ``augmentation`` as ``ikem_fast.ops.augment`` takes it."""
    return AugmentationSettings(**dataclasses.asdict(config.augmentation))


def resolve_device(config: Config) -> torch.device:
    """The device to run on. Raises ConfigError for one that torch does not know or that is not there."""
    return find_device(config.device)


def find_device(name: str) -> torch.device:
    """The device of a name: ``"auto"`` (the CUDA device if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        ConfigError: torch does not know it or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} finds no CUDA device")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}")
    return device
