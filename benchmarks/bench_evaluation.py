"""Evaluations: features of a set of clips, linear heads on them, nearest neighbours.

The linear evaluation is a run of all its epochs, features included. "eager" computes features once, as ours does;
"release manner" derives everything anew before every epoch (quirk Q5), and so does ours in "linear evaluation, features
every epoch": with the 100 epochs of the recipe in the place of these few, both take that many times as long, while
features that are computed once stay what most of the time goes to. What the heads learn and predict is the same in all.
Encoders are freshly drawn and clips made up, which changes no work.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import step_floors
from benchmarks.baselines import eager, evaluation, release_manner, trainers
from benchmarks.baselines.evaluation import Head, Recipe
from benchmarks.cases import CALL, COMPILED, EAGER, OURS, OURS_BF16, RELEASE_MANNER, Case
from benchmarks.made_up_sets import make_clips
from benchmarks.steps import make_module
from ikem_fast import floors
from ikem_fast.data import ClipSet
from ikem_fast.engine.config import LinearConfig
from ikem_fast.engine.randomness import epoch_order
from ikem_fast.evaluation import evaluate_linear
from ikem_fast.evaluation.features import extract
from ikem_fast.evaluation.knn import knn_predict
from ikem_fast.evaluation.linear import _HeadStack
from ikem_fast.evaluation.views import views_of
from ikem_fast.floors import SIZE, Work
from ikem_fast.modalities import MODALITIES

DEFINITION = "eager, float64"
STORED = 256  # clips to train on in the set
SIZES = {
    "small": {"clips": 16, "train": 12, "test": 6, "epochs": 3, "width": 4, "neighbours": 1000},
    "full": {"clips": 128, "train": 64, "test": 32, "epochs": 5, "width": 16, "neighbours": 20000},
}
BATCH = 128  # clips at a time through the encoders
KS = (1, 5)
CLASSES, FEATURE = 60, 256  # of the nearest neighbours
FEATURE_TOLERANCE = dict.fromkeys((EAGER, COMPILED, OURS, RELEASE_MANNER), 1e-4) | {OURS_BF16: 5e-2}
# Of logits after epochs of a high learning rate, which amplify rounding.
LINEAR_TOLERANCE = dict.fromkeys((EAGER, OURS, RELEASE_MANNER), 1e-3) | {OURS_BF16: 0.2}


@functools.cache
def clip_set() -> tuple[tempfile.TemporaryDirectory, ClipSet]:
    """Clips in a folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark_clips_")
    return folder, make_clips(Path(folder.name) / "clips", STORED)


def split(name: str) -> ClipSet:
    return clip_set()[1].split(name)


@functools.lru_cache(maxsize=1)
def make_encoders(way: str, width: int, device: str) -> torch.nn.Module:
    """Of one way, in eval mode, always with the same weights."""
    sizes = {"width": width, "modalities": len(MODALITIES), "queue": 16}
    module = make_module("single", sizes, 0.5, "bf16" if way == OURS_BF16 else "fp32").to(device).eval()
    if way in (OURS, OURS_BF16):
        return module
    manner = {COMPILED: trainers.compiled, RELEASE_MANNER: lambda: release_manner}.get(way, lambda: eager)()
    trainer = trainers.like(module, manner).eval()
    return trainer.double() if way == DEFINITION else trainer


def features_of(way: str, width: int, device: str, clips: ClipSet) -> Tensor:
    """(S, N, d), by our own loop over a set or a baseline's."""
    encoders = make_encoders(way, width, device)
    if way in (OURS, OURS_BF16):
        return extract(encoders, clips, batch_size=BATCH, device=device).features
    batches = (batch for _, batch in clips.in_batches(BATCH, device=device))
    if way == DEFINITION:
        batches = (replace(batch, clips=batch.clips.double()) for batch in batches)
    return evaluation.extract(encoders.features, batches)


def error_of_rows(result: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor]) -> float:
    """The largest error of any modality or view, relative to its largest magnitude."""
    if isinstance(expected, Mapping):
        if result.keys() != expected.keys():
            return math.inf
        result, expected = (torch.stack([values[name] for name in expected]) for values in (result, expected))
    if result.shape != expected.shape:
        return math.inf
    result, expected = (values.detach().cpu().double().flatten(1) for values in (result, expected))
    return float(((result - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)).max())


# ---- features


def features_case(clips: int, width: int, ways: tuple[str, ...], **options: Any) -> Case:
    def draw(generator: torch.Generator) -> tuple[Tensor, str]:
        device = generator.device
        return torch.randperm(STORED, generator=generator, device=device)[:clips].cpu(), device.type

    def way_of(way: str) -> Callable[[Any], Tensor]:
        return lambda inputs: features_of(way, width, inputs[1], split("train").subset(inputs[0]))

    shapes = step_floors.Shapes(clips=clips, width=width)
    return Case(
        op="features of a set",
        phase=CALL,
        sizes={"clips": clips, "modalities": len(MODALITIES), "width": width},
        draw=draw,
        ways={way: way_of(way) for way in ways},
        expected=way_of(DEFINITION),
        tolerance=FEATURE_TOLERANCE,
        floor=step_floors.features(shapes),
        floor_bf16=step_floors.features(replace(shapes, kind="bf16")),
        error=error_of_rows,
        clips=clips,
        **options,
    )


# ---- linear evaluation


class Judged(NamedTuple):
    """Clips of a linear evaluation, and the seed of its heads and orders."""

    train: Tensor
    test: Tensor
    seed: int
    device: str


def linear_case(
    op: str, ways: tuple[str, ...], *, train: int, test: int, epochs: int, width: int, every_epoch: bool = False
) -> Case:
    settings = LinearConfig(epochs=epochs, milestones=[max(1, epochs - 1)], feature_batch_size=BATCH)

    def draw(generator: torch.Generator) -> Judged:
        numbers = torch.randperm(STORED, generator=generator, device=generator.device)[:train].cpu()
        tests = torch.arange(len(split("test")))[:test]
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        return Judged(numbers, tests, seed, generator.device.type)

    def sets(judged: Judged) -> tuple[ClipSet, ClipSet]:
        return split("train").subset(judged.train), split("test").subset(judged.test)

    def ours(way: str) -> Callable[[Judged], dict[str, Tensor]]:
        def run(judged: Judged) -> dict[str, Tensor]:
            method = make_encoders(way, width, judged.device)
            method.quirks = replace(method.quirks, rederive_evaluation_features=every_epoch)
            result = evaluate_linear(
                method, *sets(judged), settings, rescale=True, seed=judged.seed, device=judged.device
            )
            return {view: result.scores[view] for view in views_of(MODALITIES)}

        return run

    def baseline(way: str) -> Callable[[Judged], dict[str, Tensor]]:
        def run(judged: Judged) -> dict[str, Tensor]:
            of_train, of_test = sets(judged)
            device, dtype = judged.device, torch.float64 if way == DEFINITION else torch.float32
            heads = drawn_heads(16 * width, of_train.num_classes, judged.seed, device, dtype)
            return evaluation.train_heads(
                lambda: evaluation.rescaled(*(features_of(way, width, device, clips) for clips in (of_train, of_test))),
                torch.from_numpy(of_train.labels).to(device),
                heads,
                [epoch_order(train, judged.seed, epoch).to(device) for epoch in range(epochs)],
                Recipe(rates(settings), settings.sgd_momentum, min(settings.batch_size, train)),
                every_epoch=way == RELEASE_MANNER,
            )

        return run

    shapes = step_floors.Shapes(clips=train + test, width=width)
    return Case(
        op=op,
        phase=CALL,
        sizes={"train": train, "test": test, "epochs": epochs, "width": width},
        draw=draw,
        ways={way: ours(way) if way in (OURS, OURS_BF16) else baseline(way) for way in ways},
        expected=baseline(DEFINITION),
        tolerance=LINEAR_TOLERANCE,
        floor=linear_floor(shapes, train, test, epochs),
        floor_bf16=linear_floor(replace(shapes, kind="bf16"), train, test, epochs),
        error=error_of_rows,
        clips=train + test,
    )


def rates(settings: LinearConfig) -> list[float]:
    """Learning rates by epoch."""
    passed = [sum(epoch >= milestone for milestone in settings.milestones) for epoch in range(settings.epochs)]
    return [settings.learning_rate * settings.gamma**number for number in passed]


def drawn_heads(features: int, classes: int, seed: int, device: str, dtype: torch.dtype) -> dict[str, Head]:
    """The heads that our evaluation starts from."""
    views = views_of(MODALITIES)
    stack = _HeadStack(views, MODALITIES, features, classes, [seed])
    weight, bias = stack.weight.detach()[0].mT.to(device, dtype), stack.bias.detach()[0, :, 0].to(device, dtype)
    return {
        view: Head([MODALITIES.index(name) for name in names], weight[stack.heads_of(view)], bias[stack.heads_of(view)])
        for view, names in views.items()
    }


def linear_floor(shapes: step_floors.Shapes, train: int, test: int, epochs: int) -> Work:
    """Features of all clips once; in every epoch they are read, and each of the heads of all views goes over them, over
    the training clips also for its gradient.
    """
    heads = sum(len(names) for names in views_of(MODALITIES).values())
    products = 2 * heads * shapes.feature * len(clip_set()[1].class_names) * (2 * train + test)
    read = SIZE["fp32"] * shapes.modalities * (train + test) * shapes.feature
    return step_floors.features(shapes) + Work(read, products, shapes.kind) * epochs


# ---- nearest neighbours


def knn_case(train: int, test: int, ways: tuple[str, ...]) -> Case:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        device = generator.device
        centres = torch.randn(CLASSES, FEATURE, generator=generator, device=device)
        labels = torch.randint(CLASSES, (train + test,), generator=generator, device=device)
        features = centres[labels] + 4 * torch.randn(train + test, FEATURE, generator=generator, device=device)
        return features[:train], labels[:train], features[train:]

    def competent(inputs: tuple[Tensor, Tensor, Tensor]) -> dict[int, Tensor]:
        return evaluation.knn_predict(*inputs, KS)

    def expected(inputs: tuple[Tensor, Tensor, Tensor]) -> dict[int, Tensor]:
        features, labels, tests = inputs
        return evaluation.knn_predict(features.double(), labels, tests.double(), KS)

    def share_that_differs(result: Mapping[int, Tensor], right: Mapping[int, Tensor]) -> float:
        return max(float((result[k] != right[k]).double().mean()) for k in KS)

    functions = {
        EAGER: competent,
        COMPILED: torch.compile(competent, dynamic=False),
        OURS: lambda inputs: knn_predict(*inputs, ks=KS),
    }
    bytes_moved = SIZE["fp32"] * FEATURE * (train + test) + 8 * train + 8 * len(KS) * test
    return Case(
        op="nearest neighbours",
        phase=CALL,
        sizes={"train": train, "test": test, "features": FEATURE},
        draw=draw,
        ways={way: functions[way] for way in ways},
        expected=expected,
        tolerance=dict.fromkeys(functions, 5e-3),  # of the predictions, where rounding decides between two neighbours
        floor=floors.Work(bytes_moved, 2 * train * test * FEATURE),
        error=share_that_differs,
    )


def cases(profile: str, device: str) -> list[Case]:
    sizes = dict(SIZES[profile])
    clips, neighbours = sizes.pop("clips"), sizes.pop("neighbours")
    width = sizes["width"]
    small = profile == "small"
    # torch.compile takes minutes for an encoder.
    encoding = tuple(way for way in (EAGER, COMPILED, OURS, OURS_BF16, RELEASE_MANNER) if way != COMPILED or not small)
    listed = [
        features_case(clips, width, encoding, sweep="" if small else "batch"),
        linear_case("linear evaluation", (EAGER, OURS, OURS_BF16, RELEASE_MANNER), **sizes),
        linear_case("linear evaluation, features every epoch", (OURS, RELEASE_MANNER), **sizes, every_epoch=True),
        knn_case(neighbours, neighbours // 10, (EAGER, COMPILED, OURS)),
    ]
    if not small:
        listed += [
            features_case(number, width, (EAGER, OURS, OURS_BF16), sweep="batch") for number in (clips // 8, clips // 2)
        ]
    return listed


def test_evaluation(measure, case, way, launch):
    if launch == "graph":
        pytest.skip("cannot be captured: a loop over batches that are read from a file, or over epochs")
    measure(case, way)
