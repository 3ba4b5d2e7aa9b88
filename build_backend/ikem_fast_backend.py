"""Build backend: setuptools' own, except that it builds against the torch of the environment installed into.

torch is not in build-system.requires, since pip would then fetch another torch for every isolated build. Where the
target environment has one that satisfies the project's requirement, nothing is fetched; otherwise the requirement
joins the build's. cmake and ninja join it where the machine has none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of the backend)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from torch_finder import find_torch, torch_requirement

MINIMUM_CMAKE = (3, 22)


def tool_requirements() -> list[str]:
    """cmake and ninja, each only where PATH has none that is new enough."""
    requirements = []
    cmake = shutil.which("cmake")
    version = None
    if cmake:
        output = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < MINIMUM_CMAKE:
        requirements.append(f"cmake>={MINIMUM_CMAKE[0]}.{MINIMUM_CMAKE[1]}")
    if not shutil.which("ninja"):
        requirements.append("ninja")
    return requirements


def build_requirements() -> list[str]:
    """What this build needs beyond build-system.requires."""
    requirements = tool_requirements()
    torch = find_torch()
    if torch is None:
        requirements.append(torch_requirement())
        print(f"ikem_fast: no torch here that fits, the build fetches {requirements[-1]}", file=sys.stderr)
    else:
        print(f"ikem_fast: building against torch {torch.version} in {torch.root}", file=sys.stderr)
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()
