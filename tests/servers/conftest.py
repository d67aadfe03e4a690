"""What tests with processes share: a machine with GPUs that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.nvml.child import Child
from tests.support.fakes.world import WorldFile


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the stand-in NVML library, once for all tests of a process."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def world(tmp_path: Path) -> WorldFile:
    """Write a machine with two unequal GPUs, for a test to change."""
    return WorldFile(tmp_path / "world", nvml.unequal_pair())


@pytest.fixture
def child(library: Path, world: WorldFile) -> Iterator[Child]:
    """Start an observer of that machine in a process of its own."""
    started = Child(environment(library, world))
    yield started
    started.end()
