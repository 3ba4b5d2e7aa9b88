"""Drives CMake: how things are built is in CMakeLists.txt, everything else in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from cmake_build import CleanBuildPy, CMakeBuild, CMakeExtension

setup(
    ext_modules=[CMakeExtension("ikem_fast._C")],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
