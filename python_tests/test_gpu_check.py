"""scripts/gpu_check.sh on a pretended machine: what it runs is replaced by stubs, which pass, fail or do nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = PROJECT_ROOT / "scripts"

# One script for all programs, which looks at its own name. Variables say how it behaves.
STUB = r"""#!/bin/bash
after() {  # OPTION ARGUMENT...: what follows the last OPTION
    local option=$1 value=
    shift
    while [ $# -gt 0 ]; do [ "$1" == "$option" ] && value=$2; shift; done
    echo "$value"
}
write_junit() {  # FILE PASSED FAILED SKIPPED
    printf '<testsuites><testsuite tests="%s" failures="%s" errors="0" skipped="%s">' $(($2 + $3 + $4)) "$3" "$4" >"$1"
    [ "$4" == 0 ] || printf '<testcase><skipped message="no GPU"/></testcase>' >>"$1"
    printf '</testsuite></testsuites>' >>"$1"
    [ $(($2 + $4)) == 0 ] && exit 5
    [ "$3" == 0 ] || exit 1
}
run_python() {
    case "$*" in
        *gpu_check.py*) exec "$REAL_PYTHON" "$@" ;;
        *get_device_name*)
            [ -n "$NO_GPU" ] && echo '{"torch": "2.11.0", "cuda": "13.0", "visible": false}' && return
            echo '{"torch": "2.11.0", "cuda": "13.0", "visible": true, "name": "A GPU (80 GB)", "capability": [9, 0]}'
            ;;
        *PackageNotFoundError*) echo '["one-thing"]' ;;
        *import_module*) echo "{$MISSING}" ;;
        *cuda_part*)
            echo '{"folder": "'"${PYTHONPATH%%:*}"'/ikem_fast", "cuda_part": true, "problem": null, "gpu": true}'
            ;;
        *python_version*) echo 3.12.3 ;;
        "-m pip"*)
            echo "pip given $*"
            [ "$BUILD_FAILS ${*: -1}" == "yes ${PWD%/*}/source" ] && echo "error in /secret/place/x.cu" && exit 1
            mkdir -p "$(after --target "$@")/ikem_fast"
            touch "$(after --target "$@")/ikem_fast/_C_cuda.so"
            ;;
        "-m ikem_fast.doctor") echo "ready" ;;
        *"/source/benchmarks/bench_"*)
            echo "figures of $(basename "${@: -1}") $(after --devices "$@") $(after --profile "$@") $*"
            write_junit "$(after --junitxml "$@")" ${BENCHMARKS:-8 0 1}
            [ -n "$NO_FIGURES" ] || touch "$(after --benchmark-json "$@")"
            ;;
        "-m benchmarks.report"*) echo "report of $*" ;;
        "-m pytest"*)
            case "$(after -m "$@")" in
                cuda) counts=${GPU_TESTS:-3 0 0} ;;
                "cuda and not slow") counts=${SANITIZED_TESTS:-2 0 0} ;;
                *) counts="50 0 4" ;;
            esac
            [ "$counts" == sleep ] && echo $$ >"$CHILD" && exec sleep 60
            # shellcheck disable=SC2086
            write_junit "$(after --junitxml "$@")" $counts
            ;;
        *) echo "unexpected: $*"; exit 99 ;;
    esac
}
case "$(basename "$0")" in
    python3) run_python "$@" ;;
    nvidia-smi)
        [ -n "$NO_DRIVER" ] && echo "cannot communicate with the driver" && exit 9
        echo "580.1, 81559 MiB, 0 MiB, 0 %"
        ;;
    nvcc)
        [ "$1" == --version ] && echo "release 13.0, V13.0.88" && exit
        touch "$(after -o "$@")"
        ;;
    compute-sanitizer)
        [ "$1" == --help ] && echo "  --kernel-name arg" && exit
        tool=$(after --tool "$@")
        case "$*" in
            *"/planted none") exit 0 ;;
            *"/planted $tool") [ "$BLIND" == "$tool" ] && exit 0 || exit 86 ;;
        esac
        while [ "${1##*/}" != python3 ]; do shift; done
        "$@"
        code=$?
        [ "$SILENT" == "$tool" ] || echo "========= ERROR SUMMARY: $((${ERRORS:-0})) errors"
        [ -z "$ERRORS" ] || exit 86
        exit $code
        ;;
esac
"""


class Machine:
    """A machine on which every program that a check needs is a stub."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs, self.out, self.temporary = folder / "bin", folder / "out", folder / "tmp"
        for made in (self.programs, self.temporary):
            made.mkdir()
        stub = folder / "stub"
        stub.write_text(STUB, encoding="utf-8")
        stub.chmod(0o755)
        for name in ("python3", "nvidia-smi", "nvcc", "compute-sanitizer"):
            (self.programs / name).symlink_to(stub)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(SCRIPTS / "gpu_check.sh"), "--out", str(self.out), *arguments],
            env={
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "REAL_PYTHON": sys.executable,
                "TMPDIR": str(self.temporary),
                "CUDA_HOME": str(self.folder / "no_toolkit"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def check(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit status and what was printed."""
        process = self.start(*arguments, **environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def results(self) -> str:
        files = list(self.out.iterdir())
        assert len(files) == 1
        assert files[0].name.startswith("gpu_check_a-gpu-80-gb_20")
        assert files[0].suffix == ".md"
        return files[0].read_text(encoding="utf-8")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_check

    return gpu_check


def test_passes_where_everything_does(machine):
    wheels = machine.folder / "wheels"
    wheels.mkdir()
    (wheels / "One_Thing-1.0-py3-none-any.whl").touch()
    code, said = machine.check("--wheels", str(wheels), "--commit", "abc")
    assert code == 0, said
    assert "gpu_check: passed; results in" in said
    assert "One_Thing-1.0-py3-none-any.whl" in said
    results = machine.results()
    assert results.startswith("# GPU check: A GPU (80 GB)\n\n**passed**\n")
    for line in (
        "| torch, Python | torch 2.11.0, Python 3.12.3 |",
        "| GPU tests | passed | 0 s | 3 passed, 0 failed, 0 skipped |",
        "| compute-sanitizer racecheck | passed | 0 s | 2 passed, 0 failed, 0 skipped; ERROR SUMMARY: 0 errors |",
        "| other tests | passed | 0 s | 50 passed, 0 failed, 4 skipped |",
        "figures of bench_clip_views.py cuda full",
        "figures of bench_derive_modalities.py cuda full",
        "| bench_clip_views | passed | 0 s | 8 passed, 0 failed, 1 skipped; figures are below |",
        "| benchmark report | passed | 0 s | of ",
    ):
        assert line in results
    assert "-p pytest_benchmark.plugin" in said
    assert re.search(r"report of .*/bench_clip_views.json .*/bench_derive_modalities.json .*--out", said)
    assert "driver 580.1, nvcc 13.0.88, torch built for 13.0" in results
    assert str(machine.folder) not in results
    assert str(PROJECT_ROOT) not in results
    assert list(machine.temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "step", "reason"),
    [
        ({"GPU_TESTS": "0 0 0"}, "GPU tests", "python3 ended with code 5: no test ran: 0 passed, 0 failed, 0 skipped"),
        ({"GPU_TESTS": "2 0 1"}, "GPU tests", "2 passed, 0 failed, 1 skipped, and none may be: no GPU"),
        ({"GPU_TESTS": "2 1 0"}, "GPU tests", "python3 ended with code 1: 2 passed, 1 failed, 0 skipped"),
        ({"SILENT": "synccheck"}, "compute-sanitizer synccheck", "compute-sanitizer printed no summary"),
        ({"BLIND": "racecheck"}, "planted bugs", "racecheck with a planted bug: compute-sanitizer ended with code 0"),
        ({"MISSING": '"yaml": "No module"'}, "Python packages", "pip wheel --wheel-dir wheels pyyaml"),
    ],
)
def test_a_failing_step_fails_the_check_and_hides_no_other(machine, environment, step, reason):
    code, said = machine.check("--quick", **environment)
    assert code == 1, said
    assert f"gpu_check: FAILED: {step}; results in" in said
    results = machine.results()
    assert f"**FAILED: {step}**\n" in results
    (line,) = (line for line in results.splitlines() if line.startswith(f"| {step} |"))
    assert "| FAILED |" in line
    assert reason in line
    assert re.search(r"figures of bench_clip_views.py cuda small .* --no-compile", results)
    assert "other tests" not in results


def test_what_a_sanitizer_finds_and_a_failing_benchmark_fail_the_check(machine):
    code, said = machine.check("--quick", ERRORS="2", BENCHMARKS="7 1 0", NO_FIGURES="yes")
    assert code == 1, said
    results = machine.results()
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        reason = "compute-sanitizer ended with code 86: 2 passed, 0 failed, 0 skipped; ERROR SUMMARY: 2 errors"
        assert f"| compute-sanitizer {tool} | FAILED | 0 s | {reason} |" in results
    reason = "python3 ended with code 1: 7 passed, 1 failed, 0 skipped"
    assert f"| bench_clip_views | FAILED | 0 s | {reason} |" in results
    assert "| benchmark report | FAILED | 0 s | no benchmark left figures |" in results
    assert "| GPU tests | passed |" in results


def test_nothing_passes_without_a_build(machine):
    code, said = machine.check("--quick", BUILD_FAILS="yes")
    assert code == 1, said
    results = machine.results()
    assert "| GPU tests | not run | 0 s | the build failed |" in results
    assert "| planted bugs | passed |" in results
    assert "error in .../x.cu" in results
    assert "/secret/place" not in results


def test_without_a_gpu_it_ends_in_a_sentence(machine, gpu_check, monkeypatch):
    code, said = machine.check(NO_GPU="1")
    python = machine.programs / "python3"
    assert (code, said) == (2, f"gpu_check: torch 2.11.0 of {python} sees no GPU; nothing was run\n")
    code, said = machine.check(NO_DRIVER="1")
    reason = "nvidia-smi ended with code 9: cannot communicate with the driver"
    assert (code, said) == (2, f"gpu_check: there is no GPU on this machine ({reason}); nothing was run\n")
    assert not machine.out.exists()
    code, said = machine.check("--python", "python9")
    assert (code, said) == (2, "gpu_check: there is no 'python9': name an interpreter with --python\n")
    monkeypatch.setenv("PATH", str(machine.folder))
    with pytest.raises(
        gpu_check.gpu_report.NothingToCheck, match=r"^there is no GPU on this machine \(no nvidia-smi\)$"
    ):
        gpu_check.gpu_report.ask_nvidia_smi()


def test_an_interrupted_check_leaves_what_there_is(machine):
    child = machine.folder / "child"
    process = machine.start(GPU_TESTS="sleep", CHILD=str(child))
    deadline = time.monotonic() + 30
    while not (child.is_file() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "gpu_check: interrupted by SIGTERM; results so far in" in said
    results = machine.results()
    assert "**FAILED: GPU tests** (the check has not come to its end" in results
    assert "| doctor | passed |" in results
    assert "| GPU tests | interrupted |" in results
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert list(machine.temporary.iterdir()) == []


def test_a_step_that_takes_too_long_is_ended(gpu_check, tmp_path):
    options = gpu_check.parse_options(["--out", str(tmp_path / "out"), "--python", sys.executable])
    results = gpu_check.Results(tmp_path / "out" / "results.md", "A GPU", {})
    (tmp_path / "work").mkdir()
    check = gpu_check.Check(options, results, (8, 0), tmp_path / "work")
    begun = time.monotonic()
    assert not check.step("slow", 0.3, lambda: check.run(["bash", "-c", "echo begun; sleep 60 & sleep 60"]))
    assert time.monotonic() - begun < 20
    assert results.records[0].outcome == "FAILED"
    assert results.records[0].summary == "bash had not ended when the step's time was over"
    assert "begun\n" in results.path.read_text(encoding="utf-8")
    assert not check.step("unforeseen", 1, lambda: 1 // 0)
    assert results.records[1].summary.startswith("ZeroDivisionError")
    # What it checks is a copy without anything built.
    assert (check.source / "csrc" / "cuda" / "kernel.h").is_file()
    assert not list(check.source.rglob("*.so"))


def test_architecture(gpu_check):
    assert gpu_check.architecture((8, 0)) == "8.0"
    assert gpu_check.architecture([9, 0]) == "9.0a"
    assert gpu_check.architecture((12, 0)) == "12.0"


def test_dependencies_are_those_of_the_project(gpu_check):
    names = gpu_check.dependency_names(PROJECT_ROOT / "pyproject.toml")
    assert names == [
        "torch",
        "numpy",
        "pyyaml",
        "omegaconf",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "scikit-learn",
        "safetensors",
    ]


def test_paths_are_cut(gpu_check):
    for text, cut in (
        ("in /opt/a/lib/x.py:3 and '/tmp/y'", "in .../x.py:3 and '.../y'"),
        ("5 clips/s, 3/4, a/b/c", "5 clips/s, 3/4, a/b/c"),
    ):
        assert gpu_check.gpu_report.without_paths(text) == cut


def test_benchmarks_for_a_gpu_are_found(gpu_check):
    known = [path.stem for path in sorted(PROJECT_ROOT.glob("benchmarks/bench_*.py")) if gpu_check.knows_cuda(path)]
    assert {"bench_clip_views", "bench_derive_modalities", "bench_encoder"} <= set(known)
    assert "bench_parse_skeleton" not in known


def test_help_tells_every_option():
    said = subprocess.run(
        ["bash", str(SCRIPTS / "gpu_check.sh"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--quick", "--out DIR", "--wheels DIR", "--python PYTHON", "--commit NAME"):
        assert option in said
