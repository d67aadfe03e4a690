"""A clock that a test sets, and files that hang, for a process and all it starts (clock.c)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import system_packages

SOURCE = Path(__file__).parent / "clock.c"


class FakeClock:
    """Builds the library in a folder; skips without gcc."""

    def __init__(self, folder: Path) -> None:
        if not system_packages.found("gcc"):
            pytest.skip(system_packages.reason("gcc"))
        self._library = folder / "clock.so"
        self._added = folder / "clock.added"
        self._hang = folder / "clock.hang"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", self._library, SOURCE], check=True
        )
        self.set(0)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that believes in it."""
        return {
            "LD_PRELOAD": str(self._library),
            "SMARTPROXY_FAKE_CLOCK": str(self._added),
            "SMARTPROXY_FAKE_HANG": str(self._hang),
        }

    def hang(self, end: str) -> None:
        """Let opening a path that ends so hang, until `go_on`."""
        self._hang.write_text(end)

    def go_on(self) -> None:
        """Let what hangs go on."""
        self._hang.unlink()

    def set(self, added_s: int) -> None:
        """Set the clock: so many seconds after the true one, or before."""
        new = self._added.with_suffix(".new")
        new.write_text(str(added_s))
        os.replace(new, self._added)
