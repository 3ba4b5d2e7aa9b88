"""The build backend's decisions, what was installed, and the guarded loading of the extension."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import ikem_fast
from ikem_fast import _extension

PROJECT_ROOT = Path(__file__).resolve().parent.parent
MODULE_NAME = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def backend(monkeypatch):
    """Imports a module of build_backend, which needs setuptools."""
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(PROJECT_ROOT / "build_backend"))
    monkeypatch.delenv("IKEM_FAST_TORCH_ROOT", raising=False)
    return importlib.import_module


def write_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    """A folder that looks like an installed torch."""
    (folder / "torch" / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "torch" / "version.py").write_text(text, encoding="utf-8")
    return folder / "torch"


def write_extension(folder: Path, torch_version: str = torch.__version__, library: bytes | None = b"damaged") -> Path:
    """A folder with build information and, where ``library`` is given, a file in the place of ``_C``."""
    info = {"torch_version": torch_version, "python": "3.99"}
    (folder / "_build_info.json").write_text(json.dumps(info), encoding="utf-8")
    if library is not None:
        (folder / MODULE_NAME).write_bytes(library)
    return folder


# ---- finding torch


def test_torch_of_the_target_is_taken(backend, tmp_path):
    finder = backend("torch_finder")
    root = write_torch(tmp_path, "2.12.1+cu130", "13.0")
    found = finder.find_torch(folders=[tmp_path / "nothing", tmp_path])
    assert found == finder.TorchInstallation(root, "2.12.1+cu130", "13.0")


def test_torch_outside_the_requirement_is_passed_over(backend, tmp_path):
    finder = backend("torch_finder")
    for name, version in (("old", "2.9.0"), ("new", "2.14.0+cpu"), ("fitting", "2.11.0+cpu")):
        write_torch(tmp_path / name, version)
    found = finder.find_torch(folders=[tmp_path / name for name in ("old", "new", "fitting")])
    assert found.version == "2.11.0+cpu"
    assert found.cuda is None
    assert finder.find_torch(folders=[tmp_path / "old", tmp_path / "new"]) is None


def test_torch_can_be_named(backend, tmp_path, monkeypatch):
    finder = backend("torch_finder")
    root = write_torch(tmp_path, "2.9.0")
    monkeypatch.setenv("IKEM_FAST_TORCH_ROOT", str(root))
    assert finder.find_torch(folders=[]).version == "2.9.0"
    monkeypatch.setenv("IKEM_FAST_TORCH_ROOT", str(tmp_path))
    with pytest.raises(RuntimeError, match="IKEM_FAST_TORCH_ROOT must be the folder of an installed torch"):
        finder.find_torch()


def test_requirement_is_the_one_of_the_project(backend):
    assert backend("torch_finder").torch_requirement() == _extension.TORCH_REQUIREMENT
    first, end = (".".join(map(str, version)) for version in _extension.SUPPORTED_TORCH)
    assert f"torch>={first},<{end}" == _extension.TORCH_REQUIREMENT


def test_torch_joins_the_build_only_where_none_fits(backend, monkeypatch):
    module = backend("ikem_fast_backend")
    monkeypatch.setattr(module, "tool_requirements", lambda: ["cmake>=3.22"])
    assert module.build_requirements() == ["cmake>=3.22"]
    monkeypatch.setattr(module, "find_torch", lambda: None)
    assert module.build_requirements() == ["cmake>=3.22", module.torch_requirement()]


def test_tools_join_the_build_only_where_missing(backend, monkeypatch, tmp_path):
    module = backend("ikem_fast_backend")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.tool_requirements() == ["cmake>=3.22", "ninja"]
    for name, text in (("cmake", "cmake version 3.21.4"), ("ninja", "1.11")):
        (tmp_path / name).write_text(f"#!{sys.executable}\nprint('{text}')\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert module.tool_requirements() == ["cmake>=3.22"]
    (tmp_path / "cmake").write_text(f"#!{sys.executable}\nprint('cmake version 4.1.0')\n", encoding="utf-8")
    assert module.tool_requirements() == []


# ---- options of the build


@pytest.mark.parametrize(
    ("arch_list", "architectures"),
    [
        ("8.0", "80-real"),
        ("8.0 9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("8.0;8.6, 10.0", "80-real;86-real;100-real"),
        ("12.0f", "120f-real"),
        ("9.0 9.0", "90-real"),
    ],
)
def test_cuda_architectures(backend, arch_list, architectures):
    assert backend("cmake_build").cuda_architectures(arch_list) == architectures


@pytest.mark.parametrize("arch_list", ["Hopper", "80", "9.0b", "8.0+SASS"])
def test_wrong_cuda_architectures_are_named(backend, arch_list):
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST entries must read like 8\.0, 9\.0a or 10\.0\+PTX"):
        backend("cmake_build").cuda_architectures(arch_list)


def test_configure_arguments(backend, tmp_path):
    module = backend("cmake_build")
    installation = backend("torch_finder").TorchInstallation(tmp_path, "2.13.0", None)
    arguments = module.configure_arguments(installation, {})
    assert "-DIKEM_FAST_CUDA=auto" in arguments
    assert "-DIKEM_FAST_CUDA_ARCHITECTURES=" in arguments
    assert f"-DIKEM_FAST_TORCH_ROOT={tmp_path}" in arguments
    environment = {"IKEM_FAST_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": "9.0a", "CMAKE_ARGS": "-DA=1 '-DB=two words'"}
    arguments = module.configure_arguments(installation, environment)
    assert "-DIKEM_FAST_CUDA=on" in arguments
    assert "-DIKEM_FAST_CUDA_ARCHITECTURES=90a-real" in arguments
    assert arguments[-2:] == ["-DA=1", "-DB=two words"]
    with pytest.raises(ValueError, match="IKEM_FAST_CUDA must be auto, on or off, got 'yes'"):
        module.configure_arguments(installation, {"IKEM_FAST_CUDA": "yes"})


def test_build_folder_is_never_shared_between_torches(backend):
    folder = backend("cmake_build").build_folder
    make = backend("torch_finder").TorchInstallation
    here = make(Path("/here/torch"), "2.13.0+cpu", None)
    assert folder(here) == folder(here)
    assert folder(here) != folder(make(Path("/there/torch"), "2.13.0+cpu", None))
    assert folder(here) != folder(make(Path("/here/torch"), "2.12.0+cpu", None))
    one, other = (make(Path(f"/t/pip-build-env-{name}/overlay/torch"), "2.13.0", None) for name in ("a1", "b2"))
    assert folder(one) == folder(other)


def test_failed_steps_end_in_a_sentence(backend, tmp_path, monkeypatch):
    module = backend("cmake_build")
    from setuptools import Distribution

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^ikem_fast: there is no cmake on PATH"):
        module.CMakeBuild.cmake("--version")
    (tmp_path / "cmake").write_text(f"#!{sys.executable}\nraise SystemExit(2)\n", encoding="utf-8")
    (tmp_path / "cmake").chmod(0o755)
    with pytest.raises(SystemExit, match=r"^ikem_fast: `cmake --build here` failed; its messages are above$"):
        module.CMakeBuild.cmake("--build", "here")
    command = module.CMakeBuild(Distribution())
    monkeypatch.setenv("IKEM_FAST_CUDA", "perhaps")
    with pytest.raises(SystemExit, match=r"^ikem_fast: IKEM_FAST_CUDA must be auto, on or off, got 'perhaps'$"):
        command.run()
    monkeypatch.setattr(module, "find_torch", lambda: None)
    with pytest.raises(SystemExit, match=r"^ikem_fast: no torch to build against was found"):
        command.run()


def test_modules_that_are_gone_are_not_shipped(backend, tmp_path, monkeypatch):
    module = backend("cmake_build")
    from setuptools import Distribution

    stale = tmp_path / "build" / "lib" / "ikem_fast" / "renamed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (tmp_path / "ikem_fast").mkdir()
    (tmp_path / "ikem_fast" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    command = module.CleanBuildPy(Distribution({"packages": ["ikem_fast"], "script_name": "setup.py"}))
    command.build_lib = str(tmp_path / "build" / "lib")
    command.ensure_finalized()
    command.run()
    assert [path.name for path in stale.parent.iterdir()] == ["__init__.py"]


# ---- what was installed


def test_build_info_in_the_module_and_beside_it_agree():
    info = _extension.require().build_info()
    chosen = info.pop("cpu_capability")
    assert info == _extension.read_build_info()
    assert info["version"] == ikem_fast.__version__ == importlib.metadata.version("ikem_fast")
    assert chosen in info["cpu_capabilities"]
    assert info["cpu_capabilities"][0] == "default"
    assert info["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]


def test_cpu_capability_can_be_chosen(monkeypatch):
    module = _extension.require()
    monkeypatch.setenv("IKEM_FAST_CPU_CAPABILITY", "default")
    assert module.build_info()["cpu_capability"] == "default"
    monkeypatch.setenv("IKEM_FAST_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match="must be default, avx2 or avx512, got 'sse9'"):
        module.build_info()


def test_package_data_is_installed():
    source = PROJECT_ROOT / "ikem_fast"
    files = sorted(path.relative_to(source) for path in source.rglob("*.yaml"))
    assert Path("skeletons/ntu-rgb+d.yaml") in files
    assert [path for path in files if not (_extension.PACKAGE_FOLDER / path).is_file()] == []


def test_every_package_of_the_source_is_installed():
    source = PROJECT_ROOT / "ikem_fast"
    files = sorted(path.relative_to(source) for path in source.rglob("*.py"))
    assert Path("__init__.py") in files
    assert [path for path in files if not (_extension.PACKAGE_FOLDER / path).is_file()] == []


# ---- guarded loading


def test_loaded():
    assert _extension.available()
    assert _extension.problem() is None
    assert _extension.require().__name__ == "ikem_fast._C"


def test_missing_torch(tmp_path):
    assert _extension.find_problem(None, tmp_path) == (
        "ikem_fast needs torch, which is not installed here: install it with `pip install 'torch>=2.11,<2.14'`"
    )


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_missing_or_incomplete_build(tmp_path, content):
    if content is not None:
        (tmp_path / "_build_info.json").write_text(content, encoding="utf-8")
    problem = _extension.find_problem(torch.__version__, tmp_path)
    assert problem.startswith("ikem_fast's compiled part is missing: build it in the source tree with `pip install ")


def test_other_torch_is_refused_before_anything_is_loaded(tmp_path):
    write_extension(tmp_path, torch_version="2.13.0+cpu")
    assert _extension.find_problem("2.11.0", tmp_path) == (
        "ikem_fast's compiled part was built for torch 2.13.0 but torch 2.11.0 is running: reinstall with "
        "`pip install --force-reinstall --no-deps .`"
    )
    # The flavour of a build and the patch version leave torch's C++ interface as it is.
    assert _extension.find_problem("2.13.1+cu130", tmp_path) is None


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0a0+git123", "3.0.0"])
def test_unsupported_torch_is_named(tmp_path, version):
    write_extension(tmp_path, torch_version=version)
    assert _extension.find_problem(version, tmp_path).startswith(
        f"ikem_fast needs torch>=2.11,<2.14 but torch {version.split('+')[0]} is running: install one with "
    )


def test_other_python_is_named(tmp_path):
    write_extension(tmp_path, library=None)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    problem = _extension.find_problem(torch.__version__, tmp_path)
    assert problem.startswith(f"ikem_fast's compiled part was built for Python 3.99 but Python {running} is running")


def test_damaged_library_is_one_sentence(tmp_path):
    real = (_extension.PACKAGE_FOLDER / MODULE_NAME).read_bytes()
    for library in (b"", b"not a library", real[:2000], real[: len(real) // 2], real[:-1]):
        write_extension(tmp_path, library=library)
        assert _extension.find_problem(torch.__version__, tmp_path) is None
        with pytest.raises(
            _extension.ExtensionError, match=r"^ikem_fast's compiled part cannot be loaded \("
        ) as caught:
            _extension.load_module(tmp_path)
        assert "\n" not in str(caught.value)
        assert "reinstall with" in str(caught.value)


def test_require_raises_the_problem(monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_problem", "the reason")
    assert not _extension.available()
    with pytest.raises(_extension.ExtensionError, match=r"^the reason$"):
        _extension.require()


def test_import_of_the_package_never_raises(tmp_path):
    """A copy of the package's two first files with a damaged library imports, and says what is wrong when asked."""
    package = tmp_path / "ikem_fast"
    package.mkdir()
    for name in ("__init__.py", "_extension.py"):
        (package / name).write_bytes((_extension.PACKAGE_FOLDER / name).read_bytes())
    write_extension(package)
    program = "import ikem_fast._extension as e; print(e.available()); print(e.problem())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("False\nikem_fast's compiled part cannot be loaded (")
    assert result.stderr == ""


def test_the_source_tree_steps_aside_for_the_installed_package(tmp_path):
    """``pip install . && python -m ikem_fast.train demo``: the working folder is the tree, which is not built."""
    tree = tmp_path / "tree"
    (tree / "ikem_fast").mkdir(parents=True)
    shutil.copy(_extension.PACKAGE_FOLDER / "__init__.py", tree / "ikem_fast")
    command = [sys.executable, "-c", "import ikem_fast; print(ikem_fast.__file__, ikem_fast._extension.PACKAGE_FOLDER)"]
    installed = {**os.environ, "PYTHONPATH": str(_extension.PACKAGE_FOLDER.parent)}
    (tree / "pyproject.toml").touch()
    shown = subprocess.run(command, cwd=tree, env=installed, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(tree / "ikem_fast" / "__init__.py"), str(_extension.PACKAGE_FOLDER)]
