"""The losses of two runs side by side, such as one in float32 and one in bfloat16.

    python -m ikem_fast.train pretrain --data CLIPS --out fp32 --config cpu-small epochs=10
    python -m ikem_fast.train pretrain --data CLIPS --out bf16 --config cpu-small epochs=10 precision=bf16
    python benchmarks/compare_runs.py fp32 bf16

Prints, for every log line that both have, the summed loss of either and their relative difference, and the nearest
neighbours' accuracy along the way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_log(run: Path) -> dict[tuple[str, int], dict]:
    """Log lines by kind and step."""
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return {(line["kind"], line["step"]): line for line in lines if line["kind"] in ("train", "knn")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs=2)
    arguments = parser.parse_args()
    names = [run.name for run in arguments.runs]
    first, second = (read_log(run) for run in arguments.runs)
    shared = sorted(first.keys() & second.keys(), key=lambda key: (key[1], key[0]))
    if not shared:
        raise SystemExit(f"{names[0]} and {names[1]} have no step of their logs in common")
    print(f"| step | stage | loss, {names[0]} | loss, {names[1]} | difference |\n| --- | --- | --- | --- | --- |")
    largest = 0.0
    for key in shared:
        if key[0] == "train":
            one, other = first[key], second[key]
            difference = other["loss"] / one["loss"] - 1
            largest = max(largest, abs(difference))
            print(f"| {key[1]} | {one['stage']} | {one['loss']:.3f} | {other['loss']:.3f} | {difference:+.2%} |")
    print(f"\nLargest difference: {largest:.2%}")
    for kind, step in shared:
        if kind == "knn":
            pairs = {
                view: (100 * accuracy, 100 * second[kind, step]["accuracy"][view])
                for view, accuracy in first[kind, step]["accuracy"].items()
            }
            shown = ", ".join(f"{view} {one:.1f} / {other:.1f}" for view, (one, other) in pairs.items())
            print(f"step {step}, nearest neighbour %, {names[0]} / {names[1]}: {shown}")


if __name__ == "__main__":
    main()
