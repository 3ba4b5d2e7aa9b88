"""What scripts/gpu_check.py writes: the facts about machine and commit, what became of each step, the results file.

Standard library only.
"""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent

TORCH_FACTS = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "visible": torch.cuda.is_available()}
if facts["visible"]:
    facts["name"] = torch.cuda.get_device_name(0)
    facts["capability"] = torch.cuda.get_device_capability(0)
print(json.dumps(facts))
"""


class NothingToCheck(Exception):
    """There is no GPU, or nothing to use it with; the message says what is missing."""


@dataclass
class Record:
    """What became of a step.

    Attributes:
        outcome: passed, FAILED, interrupted or not run.
        summary: one line; of a step that did not pass, why.
        output: all that its commands printed.
        is_figure: whether the output belongs into the results also if the step passed.
    """

    name: str
    outcome: str = "passed"
    seconds: float = 0.0
    summary: str = ""
    output: list[str] = field(default_factory=list)
    is_figure: bool = False


def without_paths(text: str) -> str:
    """Cuts absolute paths down to their last part: the rest says where one machine keeps its things."""
    return re.sub(r"(?<![\w.:/])/(?:[^/\s'\"`():,;]+/)+", ".../", text)


def fenced(output: list[str]) -> list[str]:
    """Output as a code block, without colours and paths."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(output)).replace("```", "'''")
    return ["```text", *without_paths(text).strip("\n").splitlines(), "```"]


def ask_nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says about the first GPU.

    Raises:
        NothingToCheck: there is no nvidia-smi, or it sees no GPU.
    """
    fields = ("driver_version", "memory.total", "memory.used", "utilization.gpu")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if answer.returncode != 0:
            said = f"{answer.stdout} {answer.stderr}".strip()
            raise ValueError(f"nvidia-smi ended with code {answer.returncode}: {said}")
        first = next(csv.reader(answer.stdout.splitlines(), skipinitialspace=True), [])
        return dict(zip(fields, first, strict=True))
    except FileNotFoundError:
        raise NothingToCheck("there is no GPU on this machine (no nvidia-smi)") from None
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise NothingToCheck(f"there is no GPU on this machine ({error})") from None


def ask_torch(python: str) -> dict:
    """What torch says about itself and its first GPU.

    Raises:
        NothingToCheck: it cannot be imported, or sees no GPU.
    """
    answer = subprocess.run([python, "-c", TORCH_FACTS], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise NothingToCheck(f"{python} cannot import torch ({reason}): name another interpreter with --python")
    facts = json.loads(answer.stdout.splitlines()[-1])
    if not facts["visible"]:
        raise NothingToCheck(f"torch {facts['torch']} of {python} sees no GPU")
    return facts


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or in the toolkit's folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


def nvcc_version() -> str:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return "no nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    return f"nvcc {version.group(1) if version else 'of unknown version'}"


def describe_commit(given: str | None) -> str:
    """The commit of the source tree, with -dirty where files differ from it, results apart."""
    git = ["git", "-c", "safe.directory=*", "-C", str(PROJECT_ROOT)]

    def ask(*arguments: str) -> str:
        return subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() == PROJECT_ROOT:
            changed = ask("status", "--porcelain", "--", ".", ":!benchmarks/results")
            return ask("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return given or "unknown"


def describe_cpu() -> str:
    """Model and number of usable cores."""
    hardware = runpy.run_path(str(PROJECT_ROOT / "ikem_fast" / "hardware.py"))  # importing the package would need torch
    return f"{hardware['cpu_name']()}, {hardware['usable_cores']()} cores"


def describe(smi: dict[str, str], torch: dict, python: str, commit: str | None) -> dict[str, str]:
    """What was checked, on what: (name, value) lines of the results."""
    program = "import platform; print(platform.python_version())"
    version = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
    package = (PROJECT_ROOT / "ikem_fast" / "__init__.py").read_text(encoding="utf-8")
    package_version = re.search(r'^__version__ = "(.*)"', package, re.MULTILINE).group(1)
    capability = ".".join(map(str, torch["capability"]))
    return {
        "GPU": f"{torch['name']}, compute capability {capability}, {smi['memory.total']}; before the check "
        f"{smi['memory.used']} in use, {smi['utilization.gpu']} busy",
        "driver, CUDA": f"driver {smi['driver_version']}, {nvcc_version()}, torch built for {torch['cuda']}",
        "torch, Python": f"torch {torch['torch']}, Python {version}",
        "CPU": f"{describe_cpu()}, load average {os.getloadavg()[0]:.1f} before the check",
        "ikem_fast": f"{package_version}, commit {describe_commit(commit)}",
    }


@dataclass
class Results:
    """The results file: after every step whole, and without paths of the machine.

    Attributes:
        facts: (name, value) lines about what was checked on what.
        is_finished: whether every step has had its turn.
    """

    path: Path
    title: str
    facts: dict[str, str]
    records: list[Record] = field(default_factory=list)
    is_finished: bool = False

    def failures(self) -> list[Record]:
        return [record for record in self.records if record.outcome != "passed"]

    def verdict(self) -> str:
        failed = self.failures()
        if failed:
            return f"FAILED: {', '.join(record.name for record in failed)}"
        return "passed" if self.is_finished else "not finished"

    def text(self) -> str:
        unfinished = "" if self.is_finished else " (the check has not come to its end; below is what there is)"
        lines = [f"# GPU check: {self.title}", "", f"**{self.verdict()}**{unfinished}", ""]
        lines += ["`scripts/gpu_check.sh`, docs/developer/gpu_check.md.", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in self.facts.items()]
        lines += ["", "| step | outcome | time | |", "| --- | --- | --- | --- |"]
        for record in self.records:
            summary = " ".join(without_paths(record.summary).replace("|", "\\|").split())
            lines.append(f"| {record.name} | {record.outcome} | {record.seconds:.0f} s | {summary} |")
        for record in self.records:
            if record.outcome == "passed" and record.is_figure:
                lines += ["", f"## {record.name}", "", *fenced(record.output)]
        for record in self.failures():
            if record.output:
                title = f"## {record.name}, {record.outcome}: the end of its output"
                lines += ["", title, "", *fenced(record.output[-60:])]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Puts the file in the place of an earlier one once it is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".gpu_check_")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(self.text())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise
