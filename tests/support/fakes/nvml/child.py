"""A test's end of look.py: an observer in a process of its own, over the stand-in NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
#: longer than the observer waits before it initialises NVML again
LATER_S = 60


class Child:
    """The observer in its process."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fakes.nvml.look"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | env,
        )

    def tell(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def look(self) -> dict[str, Any]:
        return dict(self.tell("look"))

    def look_later(self) -> dict[str, Any]:
        """Look when a failed NVML is tried again."""
        self.tell(f"pass {LATER_S}")
        return self.look()

    def gpus(self) -> dict[str, dict[str, Any]]:
        return {gpu["uuid"]: gpu for gpu in self.look()["gpus"]}

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
