"""tests/unit starts no process: conftest.py refuses every way to start one."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
from collections.abc import Callable

import pytest


def in_asyncio() -> None:
    asyncio.run(asyncio.create_subprocess_exec("true"))


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: subprocess.check_output("true", shell=True),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.fork(),
        lambda: multiprocessing.get_context("fork").Process(target=print).start(),
        in_asyncio,
    ],
)
def test_a_process_is_refused(start: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="tests/servers is for those"):
        start()
