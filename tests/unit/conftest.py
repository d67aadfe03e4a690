"""What tests without processes share."""

from __future__ import annotations

import os
import subprocess
from typing import NoReturn

import pytest


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a process: it belongs to tests/servers."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a test in tests/unit starts a process; tests/servers is for those")

    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, refused)
