"""The steps of scripts/gpu_check.sh, which says how to call it: what they run and what they demand.

Standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_report
from gpu_report import PROJECT_ROOT, Record, Results, find_tool

# What a build, the tests and the benchmarks need; they are copied, so that the source tree stays as it is.
SOURCES = (
    "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "benchmarks", "build_backend", "cmake", "csrc",
    "ikem_fast", "pyproject.toml", "python_tests", "scripts", "setup.py",
)  # fmt: skip
NOT_SOURCES = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
# Where a package's module has another name.
MODULES = {"pyyaml": "yaml", "pytest-benchmark": "pytest_benchmark", "py-cpuinfo": "cpuinfo"}
BENCHMARK_LIMIT, BENCHMARK_SECONDS = 300, 220  # of a file's step, and until when it begins with another benchmark
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BUG_FOUND = 86  # compute-sanitizer's exit code then

NOT_INSTALLED = """
import importlib.metadata, json, sys
def is_missing(name):
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return True
print(json.dumps([name for name in sys.argv[1:] if is_missing(name)]))
"""
NOT_IMPORTABLE = """
import importlib, json, sys
problems = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        problems[name] = str(error)
print(json.dumps(problems))
"""
INSTALLATION = """
import json, torch
from ikem_fast import _extension
print(json.dumps({
    "folder": str(_extension.PACKAGE_FOLDER), "cuda_part": _extension.cuda_available(),
    "problem": _extension.problem() or _extension.cuda_problem(), "gpu": torch.cuda.is_available(),
}))
"""


class StepFailed(Exception):
    """A step did not pass; the message says why, in one sentence."""


class Interrupted(BaseException):
    """A signal ended the check."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def architecture(capability: Sequence[int]) -> str:
    """What TORCH_CUDA_ARCH_LIST must be for a GPU; 9.0 has instructions of its own, which the kernels may use."""
    return {(9, 0): "9.0a"}.get(tuple(capability), "{}.{}".format(*capability))


def dependency_names(pyproject: Path) -> list[str]:
    """Names of the run-time dependencies in a pyproject.toml, which Python 3.10 has no parser for."""
    text = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\s*\"([A-Za-z0-9._-]+)", text.group(1), re.MULTILINE)


def judge_tests(junit: Path, allow_skips: bool) -> str:
    """The counts in pytest's JUnit file, in words.

    Raises:
        StepFailed: there is no such file, no test ran, one failed, or one was skipped and none may be.
    """
    if not junit.is_file():
        raise StepFailed("pytest wrote no result")
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    passed, failed = total - failures - errors - skipped, failures + errors
    counts = f"{passed} passed, {failed} failed, {skipped} skipped"
    if failed:
        raise StepFailed(counts)
    if skipped and not allow_skips:
        reasons = {element.get("message", "") for suite in suites for element in suite.iter("skipped")}
        raise StepFailed(f"{counts}, and none may be: {'; '.join(sorted(reasons))}")
    if not passed:
        raise StepFailed(f"no test ran: {counts}")
    return counts


def sanitizer_summary(output: Sequence[str]) -> str | None:
    """compute-sanitizer's own last word; without one it has checked nothing."""
    summaries = re.findall(r"^=+ (\w+ SUMMARY: .*)$", "".join(output), re.MULTILINE)
    return summaries[-1].strip() if summaries else None


def knows_cuda(benchmark: Path) -> bool:
    """Whether a file of benchmarks has any for a GPU."""
    return re.search(r'^DEVICES = \("cpu",\)', benchmark.read_text(encoding="utf-8"), re.MULTILINE) is None


class Check:
    """Runs steps one after another and keeps the results file up to date."""

    def __init__(self, options: argparse.Namespace, results: Results, capability: Sequence[int], work: Path):
        self.options = options
        self.commit = gpu_report.describe_commit(options.commit)
        self.results = results
        self.architecture = architecture(capability)
        self.work = work
        self.source, self.site, self.elsewhere = work / "source", work / "site", work / "elsewhere"
        for folder in (self.source, self.site, self.elsewhere):
            folder.mkdir()
        for name in SOURCES:
            origin = PROJECT_ROOT / name
            if origin.is_dir():
                shutil.copytree(origin, self.source / name, ignore=NOT_SOURCES)
            else:
                shutil.copy(origin, self.source / name)
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "IKEM_FAST_CUDA": "on",
            "TORCH_CUDA_ARCH_LIST": self.architecture,
            # cmake and ninja may be installed beside the interpreter only.
            "PATH": os.pathsep.join([os.path.dirname(options.python), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        self._current = Record("")
        self._deadline = 0.0

    # ---- running

    def step(self, name: str, limit: int, action: Callable[[], str], *, is_figure: bool = False) -> bool:
        """Runs ``action``, which returns a summary, for at most ``limit`` seconds; whether it passed."""
        print(f"\n==> {name} (at most {limit} s)", flush=True)
        record = self._current = Record(name, is_figure=is_figure)
        self.results.records.append(record)
        begun = time.monotonic()
        self._deadline = begun + limit
        try:
            record.summary = action()
        except Interrupted as signalled:
            record.outcome, record.summary = "interrupted", f"by {signalled}"
            raise
        except StepFailed as failure:
            record.outcome, record.summary = "FAILED", str(failure)
        except Exception as error:  # whatever it is, the other steps run
            record.outcome, record.summary = "FAILED", f"{type(error).__name__}: {error}"
        finally:
            record.seconds = time.monotonic() - begun
            print(f"==> {name}: {record.outcome} after {record.seconds:.0f} s: {record.summary}", flush=True)
            self.results.write()
        return record.outcome == "passed"

    def leave_out(self, name: str, reason: str) -> None:
        """Records a step that cannot run, which counts as one that failed."""
        print(f"\n==> {name}: not run, {reason}", flush=True)
        self.results.records.append(Record(name, outcome="not run", summary=reason))
        self.results.write()

    def run(self, command: Sequence[str | Path], *, expected: int = 0, **environment: str) -> str:
        """Runs a command outside the source tree and shows what it prints, which it returns.

        Raises:
            StepFailed: it ended with another code than ``expected``, or the step's time was over.
        """
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        name = Path(command[0]).name
        try:
            code = process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{name} had not ended when the step's time was over") from None
        finally:
            self._end(process)
            reader.join(5)  # no longer: a process that left the session may keep the pipe open
            self._current.output += lines
        if code != expected:
            raise StepFailed(f"{name} ended with code {code}" + (f" instead of {expected}" if expected else ""))
        return "".join(lines)

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        """Ends what a command has left running, first with a request."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    def ask(self, program: str, *arguments: str):
        """What a small program for the chosen interpreter prints, as JSON."""
        return json.loads(self.run([self.options.python, "-c", program, *arguments]).splitlines()[-1])

    # ---- steps

    def steps(self) -> list[tuple[str, int, Callable[[], str]]]:
        """Name, limit in seconds and action of everything that needs the build."""
        steps = [("doctor", 120, self.ask_doctor), ("GPU tests", 300, lambda: self.run_tests("gpu", "cuda"))]
        for tool in TOOLS:
            steps.append((f"compute-sanitizer {tool}", 240, lambda tool=tool: self.sanitize_tests(tool)))
        for path in sorted(self.source.glob("benchmarks/bench_*.py")):
            if knows_cuda(path):
                steps.append((path.stem, BENCHMARK_LIMIT, lambda path=path: self.run_benchmark(path)))
        steps.append(("benchmark report", 120, self.write_report))
        if not self.options.quick:
            steps.append(("other tests", 580, lambda: self.run_tests("other", "not cuda", allow_skips=True)))
        return steps

    def run_all(self) -> None:
        self.step("Python packages", 120, self.install_packages)
        self.step("planted bugs", 180, self.find_planted_bugs)
        built = self.step("build", 400, self.build)
        for name, limit, action in self.steps():
            if built:
                self.step(name, limit, action, is_figure=name.startswith("bench_"))
            else:
                self.leave_out(name, "the build failed")
        self.results.is_finished = True
        self.results.write()

    def install_packages(self) -> str:
        """Brings what is missing out of the folder of wheels, into a folder of our own."""
        wheels = {}
        for wheel in sorted(self.options.wheels.glob("*.whl")) if self.options.wheels else ():
            wheels[re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()] = wheel
        absent = self.ask(NOT_INSTALLED, *wheels) if wheels else []
        if absent:
            self._install(*(wheels[name] for name in absent))
        names = [
            *dependency_names(self.source / "pyproject.toml"),
            "pytest",
            "pytest-benchmark",
            "py-cpuinfo",
            "setuptools",
        ]
        needed = {MODULES.get(name.lower(), name): name for name in names}
        problems = self.ask(NOT_IMPORTABLE, *needed)
        if problems:
            reasons = "; ".join(f"{needed[module]}: {reason}" for module, reason in problems.items())
            raise StepFailed(
                f"Python packages are missing ({reasons}): where there is a network, `pip wheel --wheel-dir wheels "
                f"{' '.join(needed[module] for module in problems)}`, and here name that folder with --wheels"
            )
        return f"{len(needed)} are there{', of the wheels ' if absent else ''}{', '.join(absent)}"

    def _install(self, *what: Path) -> None:
        self.run(
            [self.options.python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
             "--disable-pip-version-check", "--target", self.site, *what]
        )  # fmt: skip

    def build(self) -> str:
        """Builds for this GPU with the packages that are there, and installs into a folder of our own."""
        self._install(self.source)
        if not (self.site / "ikem_fast" / "_C_cuda.so").is_file():
            raise StepFailed("the build left no _C_cuda.so")
        return f"for {self.architecture}"

    def ask_doctor(self) -> str:
        """The doctor's word, and that it is the new installation that was asked."""
        self.run([self.options.python, "-m", "ikem_fast.doctor"])
        facts = self.ask(INSTALLATION)
        if Path(facts["folder"]).resolve() != (self.site / "ikem_fast").resolve():
            raise StepFailed("another installation of ikem_fast comes first")
        if not (facts["cuda_part"] and facts["gpu"]):
            raise StepFailed(f"the CUDA part is not in use: {facts['problem'] or 'torch sees no GPU'}")
        return "the CUDA part is loaded"

    def run_tests(
        self, name: str, marker: str, *, allow_skips: bool = False, under: Sequence[str] = (), **environment: str
    ) -> str:
        """Runs the tests of a marker against the installation."""
        arguments = ["-m", marker, self.source / "python_tests"]
        return self.run_pytest(name, arguments, allow_skips=allow_skips, under=under, **environment)

    def run_pytest(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        allow_skips: bool = False,
        under: Sequence[str] = (),
        **environment: str,
    ) -> str:
        """Runs pytest against the installation: seen from elsewhere, no source tree is on Python's path."""
        junit = self.work / f"{name}.xml"
        command = [*under, self.options.python, "-m", "pytest", "-c", self.source / "pyproject.toml"]
        command += ["--rootdir", self.source, "-p", "no:cacheprovider", "--junitxml", junit]
        try:
            self.run([*command, *arguments], **environment)
        except StepFailed as failure:
            if not junit.is_file():
                raise
            try:
                counts = judge_tests(junit, allow_skips)
            except StepFailed as judgement:
                counts = str(judgement)
            raise StepFailed(f"{failure}: {counts}") from None
        return judge_tests(junit, allow_skips)

    def sanitizer(self, tool: str) -> list[str]:
        """The command that a program's own command follows."""
        program = find_tool("compute-sanitizer")
        if program is None:
            raise StepFailed("there is no compute-sanitizer on PATH or in CUDA_HOME")
        said = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
        command = [program, "--tool", tool, "--error-exitcode", str(BUG_FOUND)]
        command += ["--target-processes", "application-only", "--launch-timeout", "120"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch tries calls that may fail
        # Shared memory and barriers of our kernels alone. initcheck must see what others write to global memory; only
        # newer versions do so beside a filter.
        if tool in ("racecheck", "synccheck") or (tool == "initcheck" and "--initcheck-track-filtered" in said):
            command += ["--kernel-name" if "--kernel-name " in said else "--kernel-regex", "kns=ikem_fast"]
        return command

    def find_planted_bugs(self) -> str:
        """Every tool, called as for the tests, must notice a bug of its kind, and none where there is none."""
        nvcc, program = find_tool("nvcc"), self.work / "planted"
        if nvcc is None:
            raise StepFailed("there is no nvcc on PATH or in CUDA_HOME")
        machine = self.architecture.replace(".", "")
        command = [nvcc, "-std=c++17", f"-gencode=arch=compute_{machine},code=sm_{machine}", "-lineinfo", "-o", program]
        self.run([*command, self.source / "csrc/testing/planted_on_gpu.cu"])
        complaints = []
        for tool in TOOLS:
            for bug, expected in (("none", 0), (tool, BUG_FOUND)):
                try:
                    self.run([*self.sanitizer(tool), program, bug], expected=expected)
                except StepFailed as failure:
                    complaints.append(f"{tool} with {'no bug' if bug == 'none' else 'a planted bug'}: {failure}")
        if complaints:
            raise StepFailed("; ".join(complaints))
        return f"noticed by {', '.join(TOOLS)}"

    def sanitize_tests(self, tool: str) -> str:
        # Without torch's cache every tensor is an allocation of its own, at whose end an overrun shows.
        try:
            counts = self.run_tests(
                tool, "cuda and not slow", under=self.sanitizer(tool), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
        except StepFailed as failure:
            raise StepFailed(f"{failure}; {sanitizer_summary(self._current.output) or 'no summary'}") from None
        summary = sanitizer_summary(self._current.output)
        if summary is None:
            raise StepFailed(f"{counts}, but compute-sanitizer printed no summary")
        return f"{counts}; {summary}"

    def run_benchmark(self, path: Path) -> str:
        """Runs a file of benchmarks on the GPU; those that its time is too short for are skipped."""
        sizes = ["--profile", "small", "--no-compile"] if self.options.quick else ["--profile", "full"]
        arguments = ["-p", "pytest_benchmark.plugin", "--devices", "cuda", "--seconds", str(BENCHMARK_SECONDS), *sizes]
        arguments += ["--commit", self.commit, "--benchmark-columns", "median,iqr,rounds"]
        arguments += ["--benchmark-json", self.work / f"{path.stem}.json", path]
        return f"{self.run_pytest(path.stem, arguments, allow_skips=True)}; figures are below"

    def write_report(self) -> str:
        """Puts all figures into one results file beside this check's."""
        files = sorted(self.work.glob("bench_*.json"))
        if not files:
            raise StepFailed("no benchmark left figures")
        # Needs neither ikem_fast nor torch, so that the source tree may be on the path.
        command = [self.options.python, "-m", "benchmarks.report", *files, "--out", self.options.out]
        self.run(command, PYTHONPATH=str(self.source))
        return f"of {len(files)} files of figures"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "benchmarks" / "results")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--python", default="python3")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.python = os.path.abspath(shutil.which(options.python) or options.python)
    options.out = options.out.resolve()
    if options.wheels is not None:
        options.wheels = options.wheels.resolve()
        if not options.wheels.is_dir():
            parser.error(f"--wheels must be a folder, got {options.wheels}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame) -> None:
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    try:
        smi, torch = gpu_report.ask_nvidia_smi(), gpu_report.ask_torch(options.python)
    except gpu_report.NothingToCheck as reason:
        print(f"gpu_check: {reason}; nothing was run", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", torch["name"].lower()).strip("-")
    facts = gpu_report.describe(smi, torch, options.python, options.commit)
    facts["begun"] = f"{now:%Y-%m-%d %H:%M} UTC{', with --quick' if options.quick else ''}"
    results = Results(options.out / f"gpu_check_{slug}_{now:%Y-%m-%d}.md", torch["name"], facts)
    for number in signals:
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
            Check(options, results, torch["capability"], Path(work).resolve()).run_all()
    except Interrupted as signalled:
        print(f"\ngpu_check: interrupted by {signalled}; results so far in {results.path}", file=sys.stderr)
        return 128 + signalled.number
    print(f"\ngpu_check: {results.verdict()}; results in {results.path}")
    for record in results.failures():
        print(f"  {record.name}: {record.summary}")
    return 1 if results.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
