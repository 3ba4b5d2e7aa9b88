"""Results files of benchmarks and the figures that README quotes of them: by hand, and of files that are not right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import bench_training, cases, figures, report

PROJECT_ROOT = Path(__file__).resolve().parent.parent
NAME = "2026-11-22_amd-epyc-2-cores_small"


def benchmark(way, milliseconds, *, op="info_nce", clips=16, device="cpu", threads=2, calls=1, **changed):
    """What pytest-benchmark writes of a round of calls, 2 ms of which are the floor of one call."""
    extra = {
        "op": op,
        "phase": "forward",
        "sizes": {"clips": clips, "queue": 512},
        "size_label": f"N={clips} K=512",
        "device": device,
        "way": way,
        "launch": "python",
        "threads": threads,
        "calls": calls,
        "clips": clips,
        "bytes": 20_000_000,
        "operations": 1000,
        "operation_kind": "fp32",
        "floor_seconds": 2e-3,
        "limited_by": "bytes",
        "error": 1.5e-7,
        "tolerance": 1e-5,
        "sweep": "",
        "peak_bytes": None,
        **changed,
    }
    seconds = milliseconds / 1e3 * calls
    stats = {"median": seconds, "iqr": seconds / 100, "rounds": 7, "mean": 99.0}
    return {"name": f"test_{op}[{way}]", "group": "a", "extra_info": extra, "stats": stats}


def content(*benchmarks, hardware="AMD EPYC, 2 cores", **changed):
    """The JSON of a run; without rows given, one group of three ways at 8, 5 and 2.5 ms."""
    ceilings = {"copy_bytes_per_second": 10e9, "fp32_operations_per_second": 200e9, "bf16_operations_per_second": 400e9}
    return {
        "machine_info": {
            "hardware": hardware,
            "cpu": "AMD EPYC",
            "gpu": None,
            "torch": "2.13.0+cpu",
            "cuda": None,
            "ikem_fast": "0.1.0",
            "cpu_capability": "AVX512",
            "threads": 2,
            "memory_bytes": 24 * 2**30,
            "load_average_before": 0.25,
            "allocator": "memory kept",
            "python_version": "3.11.7",
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": list(benchmarks)
        or [benchmark("ours fp32", 2.5), benchmark("eager", 8.0), benchmark("eager compiled", 5.0)],
        "datetime": "2026-11-22T21:28:13+00:00",
        "ceilings": {"cpu": {"start": ceilings, "end": {**ceilings, "copy_bytes_per_second": 9.5e9}}},
        "profile": "small",
        "load_average_after": 1.5,
        **changed,
    }


def write(folder, value, name="run.json"):
    path = folder / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def table_rows(text, heading):
    """Cells of the first table after a line, by column."""
    lines = text[text.index(heading) :].splitlines()
    first = next(position for position, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def report_of(folder, *values, **options):
    """Writes the report of runs and gives its text and its figures."""
    paths = [write(folder, value, f"run{number}.json") for number, value in enumerate(values)]
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert report.main([*map(str, paths), "--out", str(folder / "results"), *arguments]) == 0
    (path,) = (folder / "results").glob("*.md")
    return path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_ratios_shares_and_rates_are_those_computed_by_hand(tmp_path):
    text, written = report_of(tmp_path, content())
    eager, compiled, ours = table_rows(text, "### info_nce, cpu")
    assert [row["way"] for row in (eager, compiled, ours)] == ["eager", "eager compiled", "ours fp32"]
    assert (ours["median"], ours["IQR"], ours["rounds"]) == ("2.50 ms", "25.0 µs", "7")
    assert (ours["× eager"], ours["× eager compiled"]) == ("3.2", "2.0")
    assert (eager["× eager"], eager["× eager compiled"], compiled["× eager"]) == ("", "0.62", "1.6")
    assert ours["clips/s"] == "6400"
    assert ours["of the floor"] == "80 % of copy bandwidth"
    assert eager["of the floor"] == "25 % of copy bandwidth"
    assert (ours["error"], ours["allowed"]) == ("1.5e-07", "1.0e-05")

    row = next(row for row in written["rows"] if row["way"] == "ours fp32")
    assert row["ratios"] == {"eager": 3.2, "eager compiled": 2.0}
    assert (row["seconds"], row["clips_per_second"], row["share_of_floor"]) == (2.5e-3, 6400, 0.8)
    assert row["sizes"] == {"clips": 16, "queue": 512}
    assert (written["hardware"], written["date"], written["profile"]) == ("AMD EPYC, 2 cores", "2026-11-22", "small")


def test_seconds_are_those_of_one_call_of_a_row_of_calls(tmp_path):
    graphs = [benchmark(way, 4.0, device="cuda", calls=50, launch="graph") for way in ("eager", "ours bf16")]
    text, written = report_of(tmp_path, content(*graphs, benchmark("ours bf16", 8.0, device="cuda")))
    assert [row["seconds"] for row in written["rows"]] == [4e-3, 8e-3, 4e-3]
    python, graph = table_rows(text, "### info_nce, cuda")[1:]
    assert (python["way"], python["× eager, graph"], graph["× eager, graph"]) == ("ours bf16", "0.50", "1.0")


def test_machine_ceilings_and_peaks_are_told(tmp_path):
    operations = {"limited_by": "operations", "operation_kind": "bf16", "peak_bytes": 3_100_000, "floor_seconds": 4e-3}
    text, _ = report_of(tmp_path, content(benchmark("ours bf16", 2.0, **operations), benchmark("eager", 8.0)))
    for told in ("AMD EPYC", "24 GiB", "2.13.0+cpu", "0123456789ab", "0.25", "1.50", "memory kept"):
        assert told in text
    assert {"device": "cpu", "ceiling": "copy", "at the start": "10.0 GB/s", "at the end": "9.50 GB/s"} in table_rows(
        text, "| device | ceiling"
    )
    assert "moved by 5 % at most." in text
    assert "Of 0 of the 2 rows the IQR is above 20 % of the median." in text
    eager, ours = table_rows(text, "### info_nce, cpu")
    assert ours["of the floor"] == "200 % of bf16 product rate"
    assert (ours["peak memory"], eager["peak memory"]) == ("3.10 MB", "")


def test_the_rows_furthest_from_their_floor_are_ours_in_order(tmp_path):
    rows = [benchmark("ours fp32", time, op=f"op{time}") for time in (4, 40, 2)] + [benchmark("eager", 400, op="op4")]
    text, _ = report_of(tmp_path, content(*rows, benchmark("ours fp32", 9, op="unknown", floor_seconds=0)))
    listed = table_rows(text, "## Furthest from their floor")
    assert [row["op"] for row in listed] == ["op40", "op4", "op2"]
    assert [row["of the floor"].split(" of")[0] for row in listed] == ["5 %", "50 %", "100 %"]


def test_runs_of_one_hardware_are_put_together_and_compared_within_a_run(tmp_path):
    one_thread = [benchmark(way, time, threads=1) for way, time in (("eager", 12.0), ("ours fp32", 4.0))]
    text, written = report_of(tmp_path, content(), content(*one_thread))
    assert [row["threads"] for row in written["rows"]] == [2, 2, 2, 1, 1]
    assert [row["ratios"].get("eager") for row in written["rows"] if row["way"] == "ours fp32"] == [3.2, 3.0]
    assert "run 2" in text
    assert f"{NAME}_scaling.svg" in text  # over threads


def test_other_hardware_gets_a_results_file_of_its_own(tmp_path):
    gpu = content(benchmark("eager", 1.0, device="cuda"), hardware="NVIDIA H100 80GB HBM3, driver 550.1")
    paths = [write(tmp_path, content()), write(tmp_path, gpu, "gpu.json")]
    assert report.main([*map(str, paths), "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.glob("*.md")}
    assert names == {f"{NAME}.md", "2026-11-22_nvidia-h100-80gb-hbm3_small.md"}


def test_a_row_that_two_runs_have_is_refused(tmp_path, capsys):
    paths = [write(tmp_path, content(), name) for name in ("a.json", "b.json")]
    assert report.main([*map(str, paths), "--out", str(tmp_path)]) == 2
    assert re.search(r"a\.json and b\.json both have the row info_nce.*--against", capsys.readouterr().err)


def test_remarks_stand_before_the_tables(tmp_path, capsys):
    remarks = tmp_path / "remarks.md"
    remarks.write_text("Measured **twice**.\n", encoding="utf-8")
    text, _ = report_of(tmp_path, content(), remarks=remarks)
    assert "of the median.\n\nMeasured **twice**.\n\n## Furthest" in text
    arguments = [str(write(tmp_path, content())), "--out", str(tmp_path), "--remarks", str(tmp_path / "none.md")]
    assert report.main(arguments) == 2
    assert "none.md" in capsys.readouterr().err


@pytest.mark.parametrize("old_is_figures", [True, False])
def test_against_an_older_run(tmp_path, old_is_figures):
    old = content(benchmark("ours fp32", 5.0), benchmark("eager", 8.01), benchmark("eager", 1.0, op="gone"))
    path = write(tmp_path, old, "old.json")
    if old_is_figures:
        assert report.main([str(path), "--out", str(tmp_path / "old")]) == 0
        path = tmp_path / "old" / f"{NAME}.json"
    text, _ = report_of(tmp_path, content(), against=path)
    ours_now = {"row": "info_nce, forward, clips 16, queue 512, cpu, 2 threads, ours fp32", "then": "5.00 ms"}
    eager, ours = table_rows(text, "## Against 2026-11-22, AMD EPYC, 2 cores")
    assert ours_now.items() <= ours.items()
    assert (ours["then"], ours["now"], ours["times as fast"]) == ("5.00 ms", "2.50 ms", "2.00")
    assert eager["times as fast"] == "1.00"
    assert "faster" in ours.values()
    assert "within the spread" in eager.values()
    assert "Only then: gone, cpu (1 rows)." in text
    assert "Only now: info_nce, cpu (1 rows)." in text


def test_300_epochs_are_estimated_from_steps_of_both_stages(tmp_path):
    of_ntu60 = {"op": bench_training.NTU60_OP, "clips": 128}
    steps = [
        benchmark("ours fp32", seconds * 1000, phase=phase, size_label="N=128 K=512", **of_ntu60)
        for phase, seconds in zip(report.NTU60_PHASES, (2.0, 4.0), strict=True)
    ]
    lone = benchmark("ours bf16", 1000, phase=report.NTU60_PHASES[0], size_label="N=128 K=512", **of_ntu60)
    text, _ = report_of(tmp_path, content(*steps, lone))
    (estimate,) = table_rows(text, "300 epochs of NTU-60")
    # 313 steps an epoch: 150 * 313 * (2 s + 4 s).
    assert estimate["steps of each stage × (stage 1 + stage 2)"] == "46950 × (2.00 s + 4.00 s)"
    assert estimate["300 epochs"] == "78.2 h"
    assert {case.phase for case in bench_training.cases("full", "cpu") if case.op == bench_training.NTU60_OP} == set(
        report.NTU60_PHASES
    )


def test_plots_are_small_svg_and_the_same_every_time(tmp_path):
    sweep = [
        benchmark(way, time * clips, clips=clips, sweep="batch")
        for way, time in (("eager", 4.0), ("ours fp32", 1.0))
        for clips in (4, 8, 16)
    ]
    text, _ = report_of(tmp_path, content(*sweep))
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert pictures == [f"{NAME}_{kind}.svg" for kind in ("ratio", "floor", "scaling")]
    before = {}
    for picture in pictures:
        data = (tmp_path / "results" / picture).read_bytes()
        ElementTree.fromstring(data)
        assert len(data) < 60_000
        before[picture] = data
    report_of(tmp_path, content(*sweep))
    assert all((tmp_path / "results" / picture).read_bytes() == data for picture, data in before.items())
    ratio, _, scaling = (" ".join(ElementTree.fromstring(data).itertext()) for data in before.values())
    assert "batch" in scaling
    assert "ms a call" in scaling
    assert "N=4 K=512" in ratio  # what the sweep starts from
    assert "N=8" not in ratio


def without(name):
    value = content()
    del value["benchmarks"][1]["extra_info"][name]
    return value


DAMAGED = {
    "no benchmarks": (content(benchmarks=[]), "holds no benchmarks"),
    "not an object": ([1], "must hold a JSON object, got list"),
    "foreign": ({"a": 1}, "has no 'machine_info'"),
    "no profile": ({key: value for key, value in content().items() if key != "profile"}, "has no 'profile'"),
    "no ceilings": (content(ceilings=None), "'ceilings' is of the wrong kind"),
    "field missing": (without("floor_seconds"), r"test_info_nce\[eager\] has no 'floor_seconds'"),
    "NaN": (content(benchmark("eager", float("nan"))), "'median' must be a finite number above 0, got nan"),
    "NaN error": (content(benchmark("eager", 1, error=float("nan"))), "'error' must be a finite number"),
    "no time": (content(benchmark("eager", 0)), "'median' must be a finite number above 0, got 0"),
    "text for a number": (content(benchmark("eager", 1, clips="16")), "'clips' is of the wrong kind, got '16'"),
    "unknown way": (content(benchmark("ours fp8", 1)), "'way' must be one of 'release manner', .* got 'ours fp8'"),
    "wrong result": (content(benchmark("ours fp32", 1, error=1.0)), "error 1 is above the allowed 1e-05"),
    "twice": (content(benchmark("eager", 1), benchmark("eager", 2)), "has two rows for info_nce, forward, N=16 K=512"),
    "sweep over nothing": (
        content(benchmark("eager", 1, sweep="modalities")),
        "a sweep over modalities must have 'modalities' in its sizes",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_not_right_is_one_clear_sentence(tmp_path, capsys, name):
    value, message = DAMAGED[name]
    assert report.main([str(write(tmp_path, value)), "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*run\.json[^\n]*{message}[^\n]*\n", said)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1', "\x00", "[" * 100_000], ids=["empty", "open", "cut", "zero", "deep"]
)
def test_a_damaged_file_is_one_clear_sentence(tmp_path, capsys, text):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    assert report.main([str(path), "--out", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: [^\n]*run\.json is no whole JSON file: [^\n]*\n", capsys.readouterr().err)


def test_a_file_that_is_not_there_is_one_clear_sentence(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "none.json cannot be read: No such file" in capsys.readouterr().err


def test_the_ways_are_those_that_are_measured():
    assert sorted(figures.WAYS) == sorted(cases.WAYS)


def test_the_report_needs_neither_torch_nor_the_package(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['ikem_fast'] = None\n"
        "from benchmarks.report import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [write(tmp_path, content()), "--out", tmp_path]
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=PROJECT_ROOT, check=True)
    assert (tmp_path / f"{NAME}.md").is_file()


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        (
            figures.seconds_text,
            {1.0: "1.00 s", 0.5256: "526 ms", 87.65e-3: "87.7 ms", 3e-6: "3.00 µs", 5e-10: "0.500 ns"},
        ),
        (figures.ratio_text, {0.123: "0.12", 0.96: "1.0", 6.96: "7.0", 41.2: "41.2", 123.4: "123"}),
        (figures.error_text, {1.23e-7: "1.2e-07", 0.0: "0"}),
        (figures.percent_text, {0.6249: "62 %", 0.0123: "1.2 %", 2.5: "250 %"}),
        (figures.three_digits, {99.96: "100", 12345: "12300", 0.01234: "0.0123", 0: "0"}),
    ],
)
def test_numbers_as_they_are_shown(shown, value):
    assert {number: shown(number) for number in value} == value


# ---- scripts/readme_figures.py ---------------------------------------------------------------------------------------

QUOTED = f"""
results:
  cpu: {NAME}
figures:
  measured-on: {{results: cpu, show: source}}
  ratio: {{results: cpu, op: info_nce, clips: 16, way: ours fp32, show: ratio to eager}}
  speed:
    results: cpu
    heading: on two cores
    rows:
      contrast: {{op: info_nce, sizes: N=16 K=512}}
    columns:
      eager: {{way: eager, show: seconds}}
      as the release: {{way: release manner, show: seconds, optional: true}}
      ours: {{way: ours fp32, show: seconds}}
      over the release: {{way: ours fp32, show: ratio to release manner, optional: true}}
      of the floor: {{way: ours fp32, show: share of floor}}
"""
README = """# Speed
Measured on <!-- figures: measured-on -->?<!-- /figures -->: <!-- figures: ratio -->?<!-- /figures --> times as fast.

<!-- figures: speed --><!-- /figures -->

End.
"""


@pytest.fixture(scope="module")
def unchanged_tree(tmp_path_factory):
    """A source tree with documents that quote a results file, up to date."""
    folder = tmp_path_factory.mktemp("quoting")
    files = ("scripts/readme_figures.py", "benchmarks/__init__.py", "benchmarks/figures.py", "ikem_fast/atomic.py")
    root = folder / "tree"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT_ROOT / name, root / name)
    results = root / "benchmarks" / "results"
    assert report.main([str(write(folder, content())), "--out", str(results)]) == 0
    (results / "quoted.yaml").write_text(QUOTED, encoding="utf-8")
    (root / "README.md").write_text(README, encoding="utf-8")
    (root / "docs").mkdir()
    (root / "docs" / "speed.md").write_text("<!-- figures: measured-on --><!-- /figures -->", encoding="utf-8")
    assert readme_figures(root)[0] == 0
    return root


@pytest.fixture
def tree(unchanged_tree, tmp_path):
    return shutil.copytree(unchanged_tree, tmp_path / "tree")


def readme_figures(root, *arguments):
    command = [sys.executable, str(root / "scripts" / "readme_figures.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def change(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_documents_are_given_the_figures_of_the_results(tree):
    text = (tree / "README.md").read_text(encoding="utf-8")
    assert "<!-- figures: ratio -->3.2<!-- /figures --> times as fast." in text
    assert f"[AMD EPYC, 2 cores, 2026-11-22](benchmarks/results/{NAME}.md)" in text
    assert table_rows(text, "figures: speed") == [
        {
            "on two cores": "contrast",
            "eager": "8.00 ms",
            "as the release": "",
            "ours": "2.50 ms",
            "over the release": "",
            "of the floor": "80 %",
        }
    ]
    assert text.endswith("\n\nEnd.\n")
    assert f"](../benchmarks/results/{NAME}.md)" in (tree / "docs" / "speed.md").read_text(encoding="utf-8")
    assert readme_figures(tree, "--check") == (0, "4 marked places, 0 figures disagree\n")


def test_check_names_every_changed_digit(tree):
    change(tree / "README.md", "-->3.2<", "-->3.9<")
    change(tree / "README.md", "8.00 ms", "8.50 ms")
    before = (tree / "README.md").read_bytes()
    status, said = readme_figures(tree, "--check")
    assert status == 1
    assert said.splitlines() == [
        "README.md:2: ratio is quoted as '3.9', the results say '3.2'",
        "README.md:4: speed, 'contrast', 'eager' is quoted as '8.50 ms', the results say '8.00 ms'",
        "4 marked places, 2 figures disagree",
    ]
    assert (tree / "README.md").read_bytes() == before
    assert readme_figures(tree)[0] == 0
    assert readme_figures(tree, "--check")[0] == 0


def test_check_finds_a_changed_results_file(tree, tmp_path):
    faster = content(benchmark("ours fp32", 2.0), benchmark("eager", 8.0))
    assert report.main([str(write(tmp_path, faster)), "--out", str(tree / "benchmarks" / "results")]) == 0
    status, said = readme_figures(tree, "--check")
    assert status == 1
    assert "ratio is quoted as '3.2', the results say '4.0'" in said
    assert "'ours' is quoted as '2.50 ms', the results say '2.00 ms'" in said
    assert "3 figures disagree" in said


def test_check_finds_other_rows_in_a_table(tree):
    change(
        tree / "benchmarks/results/quoted.yaml",
        "contrast: {op: info_nce, sizes: N=16 K=512}",
        "c: {op: info_nce}\n      d: {op: info_nce}",
    )
    assert "speed: the table has other rows or columns" in readme_figures(tree, "--check")[1]


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("README.md", "figures: ratio", "figures: other", r"README\.md:2: quoted\.yaml has no figure 'other'"),
        ("README.md", "3.2<!-- /figures -->", "3.2", r"README\.md:2: the mark of 'ratio' is not closed"),
        ("README.md", "End.", "<!-- figures: ratio -->", r"README\.md: every <!-- figures: NAME --> needs"),
        ("benchmarks/results/quoted.yaml", "clips: 16", "clips: 17", "ratio must choose one row .* fits none"),
        (
            "benchmarks/results/quoted.yaml",
            "way: ours fp32, show: ratio",
            "show: ratio",
            "ratio must choose .* fits 3: info_nce",
        ),
        (
            "benchmarks/results/quoted.yaml",
            "ratio to eager",
            "ratio to release manner",
            "has no ratio to release manner",
        ),
        (
            "benchmarks/results/quoted.yaml",
            "show: ratio to eager",
            "show: speed",
            "'show' of ratio must be one of seconds,",
        ),
        ("benchmarks/results/quoted.yaml", "clips: 16", "clips: [", r"quoted\.yaml is no YAML file"),
        (
            "benchmarks/results/quoted.yaml",
            f"cpu: {NAME}",
            "gpu: none",
            "'results' of measured-on must be one of 'gpu', got 'cpu'",
        ),
        ("benchmarks/results/quoted.yaml", f"cpu: {NAME}", "cpu: gone", r"gone\.json cannot be read"),
        (f"benchmarks/results/{NAME}.json", "0.0025", "NaN", "'seconds' must be a finite number above 0, got nan"),
    ],
)
def test_a_figure_that_cannot_be_found_is_one_clear_sentence(tree, file, before, after, message):
    change(tree / file, before, after)
    status, said = readme_figures(tree, "--check")
    assert status == 2
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", said)


def test_the_documents_of_this_project_agree_with_the_results():
    status, said = readme_figures(PROJECT_ROOT, "--check")
    assert status == 0, said
