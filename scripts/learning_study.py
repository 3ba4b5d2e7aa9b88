"""What is learned on small real sets: every stage of the method against encoders that were not trained, over seeds.

    python scripts/learning_study.py --data nw-ucla=CLIPS --data utd-mhad=CLIPS --out STUDY --seeds 3 --jobs 2

CLIPS is a folder that ``python -m ikem_fast.data prepare`` wrote. For every data set and seed it pretrains one
modality, three with and without the implicit exchange, and six, with quirks Q1 and Q7 turned round in turn; distils
the six into a student, with Q3 turned round too; judges all of them, and encoders of the same initial weights that were
not trained, by linear evaluation, nearest neighbours and logistic regression; and writes STUDY/results.md and
results.json. Runs are ordinary run folders: an interrupted study goes on where it was when the same command is given
again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

JUDGED = "judged.json"
THREE = "[joint,motion,bone]"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: its row in the table and its folder.
        what: the row's text.
        settings: what differs from the preset.
        teacher: the variant that teaches, for a student; None for pretraining.
        untrained: also judge its encoders with their initial weights.
    """

    name: str
    what: str
    settings: tuple[str, ...] = ()
    teacher: str | None = None
    untrained: bool = False


VARIANTS = (
    Variant("joint", "joint alone", ("model.modalities=[joint]", "pretrain.cross_epoch=null"), untrained=True),
    Variant("three", "joint, motion, bone", (f"model.modalities={THREE}",), untrained=True),
    Variant(
        "three-no-exchange", "the same without implicit exchange", (f"model.modalities={THREE}", "model.exchange=false")
    ),
    Variant("six", "six modalities", untrained=True),
    Variant("student", "three-modality student of the six", teacher="six"),
    Variant("six-q1", "six, Q1 turned round", ("quirks.partial_momentum_update={turned}",)),
    Variant("six-q7", "six, Q7 turned round", ("quirks.redraw_key_weights={turned}",)),
    Variant("student-q3", "student, Q3 turned round", ("quirks.teacher_in_training_mode={turned}",), teacher="six"),
)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", action="append", required=True, metavar="PRESET=DIR", help="a preset and the prepared set for it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STUDY", help="folder of all runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="VARIANT", help="some variants, and the teachers they need")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs, such as max_steps=20")
    return parser.parse_args(argv)


class Study:
    """The runs of a study and what became of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.sets = dict(text.split("=", 1) for text in options.data)
        self.seeds = range(options.seeds)
        self.jobs: int = options.jobs
        self.overrides: list[str] = options.overrides
        chosen = options.only or [variant.name for variant in VARIANTS]
        by_name = {variant.name: variant for variant in VARIANTS}
        unknown = sorted(set(chosen) - set(by_name))
        if unknown:
            raise SystemExit(f"--only must name variants of {', '.join(by_name)}, got {', '.join(unknown)}")
        teachers = {by_name[name].teacher for name in chosen}
        self.variants = [variant for variant in VARIANTS if variant.name in {*chosen, *teachers}]

    def run(self) -> None:
        """All that is not done yet, teachers before their students."""
        for waits in (False, True):
            runs = [
                (preset, variant, seed)
                for seed in self.seeds
                for preset in self.sets
                for variant in self.variants
                if (variant.teacher is not None) == waits
            ]
            with ThreadPoolExecutor(self.jobs) as pool:
                started = [pool.submit(self.train_and_judge, *run) for run in runs]
                for done in as_completed(started):
                    print(done.result(), flush=True)

    def folder(self, preset: str, name: str, seed: int) -> Path:
        return self.out / preset / name / f"seed-{seed}"

    def train_and_judge(self, preset: str, variant: Variant, seed: int) -> str:
        """One run in processes of its own, which a crash or a leak cannot carry over to the next."""
        folder = self.folder(preset, variant.name, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        result = folder / JUDGED
        if not result.is_file():
            settings = [text.format(turned=turned_round(preset, text)) for text in variant.settings]
            settings += [f"seed={seed}", *self.overrides]
            if variant.teacher is None:
                command = ["pretrain", "--data", self.sets[preset], "--config", preset]
            else:
                command = ["distill", "--teacher", str(self.folder(preset, variant.teacher, seed))]
            begin = time.monotonic()
            self.call("-m", "ikem_fast.train", *command, "--out", str(folder), "--quiet", *settings)
            self.call(__file__, "--judge", str(folder), *(["--untrained"] if variant.untrained else []))
            seconds = time.monotonic() - begin
            return f"{folder}: {seconds:.0f} s"
        return f"{folder}: done before"

    def call(self, *arguments: str) -> None:
        from ikem_fast.hardware import usable_cores

        threads = "1" if self.jobs > 1 else os.environ.get("OMP_NUM_THREADS", str(usable_cores()))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        result = subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise SystemExit(f"{' '.join(arguments)} ended with {result.returncode}: {lines[-1]}")

    def write(self) -> None:
        """results.json with every value, results.md with means and spreads."""
        from ikem_fast.atomic import atomic_open, write_json

        judged = {
            preset: {
                variant.name: [
                    read_json(self.folder(preset, variant.name, seed) / "judged.json") for seed in self.seeds
                ]
                for variant in self.variants
            }
            for preset in self.sets
        }
        write_json(self.out / "results.json", judged)
        with atomic_open(self.out / "results.md", "w") as file:
            for preset, of_variants in judged.items():
                file.write(f"## {preset}\n\n")
                file.write("| encoders | view | " + " | ".join(PROBES.values()) + " | steps |\n")
                file.write("| --- | --- |" + " --- |" * (len(PROBES) + 1) + "\n")
                for cells in table_rows(self.variants, of_variants):
                    file.write("| " + " | ".join(cells) + " |\n")
                file.write("\n")
        print(f"written to {self.out / 'results.md'} and results.json")


def turned_round(preset: str, text: str) -> str:
    """The opposite of a preset's own choice for the quirk that ``text`` sets."""
    from ikem_fast.engine.config import load_config, resolve_quirks

    field = text.partition("=")[0].removeprefix("quirks.")
    return "false" if getattr(resolve_quirks(load_config(preset)), field, None) else "true"


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


PROBES = {
    "linear": "linear top-1 %",
    "best": "best epoch on test %",
    "knn": "kNN k=1 %",
    "logistic": "logistic regression %",
}


def table_rows(variants: Sequence[Variant], judged: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Cells of every row: encoders that were not trained, then the variants, each in its single views and together."""
    groups = [(f"untrained, {v.what}", judged[v.name], "untrained") for v in variants if v.untrained]
    groups += [(v.what, judged[v.name], "trained") for v in variants]
    for title, seeds, part in groups:
        for view in seeds[0][part]:
            cells = [title, view.replace("_", " ")]
            for probe in PROBES:
                cells.append(spread([100 * values[part][view][probe] for values in seeds]))
            yield [*cells, "0" if part == "untrained" else str(seeds[0]["steps"])]


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


# ---- judging one run -------------------------------------------------------------------------------------------------


def judge(folder: Path, untrained: bool) -> None:
    """Writes judged.json of a run: what each view's frozen features are worth to three kinds of classifier."""
    import torch

    from ikem_fast import methods
    from ikem_fast.atomic import write_json
    from ikem_fast.data import ClipSet
    from ikem_fast.engine import checkpoints
    from ikem_fast.engine.config import load_config

    method, checkpoint = checkpoints.load_run(folder)
    config = load_config(checkpoint["config"])
    clip_set = ClipSet.open(checkpoint["data"]["folder"])
    sets = clip_set.split("train"), clip_set.split("test")
    result: dict[str, Any] = {"steps": checkpoint["step"], "trained": judge_encoders(method, sets, config, False)}
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fresh = methods.from_config(method.config())
        result["untrained"] = judge_encoders(fresh, sets, config, True)
    write_json(folder / JUDGED, result)


def judge_encoders(method: Any, sets: tuple[Any, Any], config: Any, untrained: bool) -> dict[str, dict[str, float]]:
    """View -> probe -> accuracy in [0, 1]."""
    from ikem_fast.evaluation.features import extract
    from ikem_fast.evaluation.knn import evaluate_knn
    from ikem_fast.evaluation.linear import evaluate_linear
    from ikem_fast.evaluation.views import views_of

    linear = evaluate_linear(method, *sets, config.linear, rescale=untrained, seed=config.seed)
    train, test = (extract(method, clips, batch_size=config.knn.feature_batch_size) for clips in sets)
    nearest = {row.name: row.accuracy[1] for row in evaluate_knn(train, test, ks=(1,))}
    return {
        row.name: {
            "linear": row.top1,
            "best": row.best_top1,
            "knn": nearest[row.name],
            "logistic": logistic_accuracy(train, test, views_of(train.names)[row.name]),
        }
        for row in linear.rows
    }


def logistic_accuracy(train: Any, test: Any, modalities: Sequence[str]) -> float:
    """Of logistic regression on the features of some modalities side by side, each standardised on the training clips.

    Unlike linear evaluation it does not depend on the size of the features or on how long its heads are trained.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = [train.names.index(name) for name in modalities]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    inputs = [part.features[chosen].double().permute(1, 0, 2).flatten(1).numpy() for part in (train, test)]
    model.fit(inputs[0], train.labels.numpy())
    return float(model.score(inputs[1], test.labels.numpy()))


def main() -> None:
    if sys.argv[1:2] == ["--judge"]:
        judge(Path(sys.argv[2]), "--untrained" in sys.argv[3:])
        return
    study = Study(parse_options())
    study.run()
    study.write()


if __name__ == "__main__":
    main()
