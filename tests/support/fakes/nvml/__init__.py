"""Build the stand-in libnvidia-ml.so.1 and make a program load it.

nvidia-ml-py opens "libnvidia-ml.so.1" by name, so LD_LIBRARY_PATH decides, once per process and
read when the process starts: a test that wants the stand-in starts a child with
`environment(library, world)`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import system_packages
from tests.support.fakes.world import WorldFile

SOURCE = Path(__file__).parent / "nvml.c"
NAME = "libnvidia-ml.so.1"


def build(directory: Path) -> Path:
    """Compile the library into the directory (0.3 s) and return its path; skips without gcc."""
    if not system_packages.found("gcc"):
        pytest.skip(system_packages.reason("gcc"))
    library = directory / NAME
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-pthread"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return library


def environment(library: Path, world: WorldFile) -> dict[str, str]:
    """Return the variables a child needs to see this world through nvidia-ml-py."""
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return world.environment | {"LD_LIBRARY_PATH": ":".join(path for path in paths if path)}
