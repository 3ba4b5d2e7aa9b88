"""Linear evaluation on features that are computed once, against features that are derived again before every epoch.

    pytest benchmarks/bench_linear_evaluation.py -s
    python benchmarks/bench_linear_evaluation.py --threads 1
    python benchmarks/bench_linear_evaluation.py --data CLIPS --config ntu60-xsub --clips 512
    python benchmarks/bench_linear_evaluation.py --run RUN

Both ways are ``evaluate_linear`` with the same recipe, on our own encoders: "again" is quirk Q5, as in the authors'
release, and derives modalities and features of all clips before every epoch. "once" is measured in full. "again" is
measured in full on few clips, where its accuracies and scores are compared with those of "once" and must be the same
numbers; on all clips some epochs of it are measured, and the time of the others, which do the same work, is
extrapolated. Beside the clock's time stands that of the processor, which other programs on the machine do not change
much. Without a run encoders are freshly initialised and without clips these are synthetic; neither changes the work.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import measuring
import torch

from ikem_fast.data import ClipSet, prepare_synthetic
from ikem_fast.engine.config import Config, LinearConfig, load_config, resolve_quirks
from ikem_fast.engine.randomness import seed_everything
from ikem_fast.evaluation import evaluate_linear
from ikem_fast.evaluation.linear import LinearEvaluation
from ikem_fast.evaluation.subjects import Run
from ikem_fast.methods import IKEM

WAYS = ("once", "again")


def parse(texts: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="prepared folder (default: the run's, or synthetic clips)")
    parser.add_argument("--run", type=Path, help="judge this run's encoders")
    parser.add_argument("--config", default="cpu-small", help="sizes and recipe without a run (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=0, help="at most so many clips of each split; 0 = all")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--measured", type=int, default=3, help="epochs of 'again' that are measured")
    parser.add_argument("--equal-clips", type=int, default=40, help="clips of each split in the full comparison")
    return parser.parse_args(texts)


def take(clip_set: ClipSet, split: str, at_most: int) -> ClipSet:
    """Evenly spaced clips of a split."""
    clips = clip_set.split(split)
    if not at_most or len(clips) <= at_most:
        return clips
    return clips.subset(torch.linspace(0, len(clips) - 1, at_most).round().long())


class Seconds(NamedTuple):
    """How long something took: by the clock, and for all threads of the process together."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def apply(self, function: Callable[..., float], *others: Seconds) -> Seconds:
        return Seconds(*(function(*values) for values in zip(self, *others, strict=True)))

    def __str__(self) -> str:
        return f"{self.clock:9.2f} s ({self.processor:9.2f} s of the processor)"


def evaluate(
    way: str, method: torch.nn.Module, sets: tuple[ClipSet, ClipSet], recipe: LinearConfig, device: str
) -> tuple[LinearEvaluation, Seconds]:
    """The result and how long it took."""
    method.quirks = replace(method.quirks, rederive_evaluation_features=way == "again")
    if device == "cuda":
        torch.cuda.synchronize()
    begin = Seconds.now()
    part = "student" if hasattr(method, "student_modalities") else None
    result = evaluate_linear(method, *sets, recipe, part=part, rescale=True, device=device)
    return result, Seconds.now().apply(lambda end, start: end - start, begin)


def shortened(recipe: LinearConfig, epochs: int) -> LinearConfig:
    milestones = [milestone for milestone in recipe.milestones if milestone < epochs]
    return replace(recipe, epochs=epochs, milestones=milestones)


def check_equal(
    method: torch.nn.Module, clip_set: ClipSet, recipe: LinearConfig, arguments: argparse.Namespace
) -> None:
    """All epochs of both ways on few clips; ends the process unless scores and accuracies are the same."""
    sets = tuple(take(clip_set, split, arguments.equal_clips) for split in ("train", "test"))
    results = {way: evaluate(way, method, sets, recipe, arguments.device)[0] for way in WAYS}
    for view, scores in results["once"].scores.items():
        if not torch.equal(scores, results["again"].scores[view]):
            raise SystemExit(f"scores of {view} differ by {(scores - results['again'].scores[view]).abs().max():.1e}")
    if results["once"].history != results["again"].history:
        raise SystemExit("accuracies after single epochs differ")
    accuracy = results["once"].rows[-1].top1
    print(
        f"in full, {recipe.epochs} epochs on {len(sets[0])} clips: scores and all accuracies are the same numbers, the "
        f"last {100 * accuracy:.1f} % on {len(sets[1])} clips"
    )


def run(arguments: argparse.Namespace) -> float:
    """Prints what it measures; returns how many times as long deriving again keeps the processor."""
    measuring.begin(arguments.device, arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        method, clip_set, config = open_all(arguments, Path(temporary))
        recipe = config.linear
        if arguments.epochs is not None:
            recipe = shortened(recipe, arguments.epochs)
        check_equal(method, clip_set, recipe, arguments)
        sets = tuple(take(clip_set, split, arguments.clips) for split in ("train", "test"))
        result, once = evaluate("once", method, sets, recipe, arguments.device)
        _, first = evaluate("again", method, sets, shortened(recipe, 1), arguments.device)
        _, several = evaluate("again", method, sets, shortened(recipe, 1 + arguments.measured), arguments.device)
        epoch = several.apply(lambda long, short: (long - short) / arguments.measured, first)
        again = first.apply(lambda short, each: short + (recipe.epochs - 1) * each, epoch)
        ratio = again.apply(lambda slow, fast: slow / fast, once)
        print(
            f"{len(sets[0])} training and {len(sets[1])} test clips of {clip_set.metadata['kind']}, "
            f"{len(result.rows)} views, features of {method.feature_size}, batches of {result.batch_size}, "
            f"{recipe.epochs} epochs"
        )
        print(f"once : {once}, all of them measured")
        print(f"again: {again}, extrapolated from {1 + arguments.measured} epochs of {epoch}")
        print(f"{ratio.clock:.1f} times as long, {ratio.processor:.1f} times of the processor")
    return ratio.processor


def open_all(arguments: argparse.Namespace, temporary: Path) -> tuple[torch.nn.Module, ClipSet, Config]:
    if arguments.run is not None:
        loaded = Run.load(arguments.run)
        data = loaded.checkpoint["data"]["folder"] if arguments.data is None else arguments.data
        return loaded.method, ClipSet.open(data), load_config(loaded.checkpoint["config"])
    if arguments.data is None:
        prepare_synthetic(temporary / "clips", num_subjects=6, num_repetitions=1, num_cameras=2)
    clip_set = ClipSet.open(temporary / "clips" if arguments.data is None else arguments.data)
    config = load_config(arguments.config)
    seed_everything(0)
    method = IKEM(clip_set.layout, **vars(config.model), quirks=resolve_quirks(config)).eval()
    return method, clip_set, config


def test_once_is_as_again_and_much_faster() -> None:
    assert run(parse(["--threads", "1", "--clips", "64"])) > 1


if __name__ == "__main__":
    run(parse())
