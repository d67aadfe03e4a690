"""What a bare machine is told: which tests were skipped, and how to get what they need; and which
Pythons the tests run on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

OWN_VERSION = "{}.{}".format(*sys.version_info)
#: new enough, but without what an environment takes, as Debian's python3 without python3-venv
WITHOUT_VENV = """#!/bin/sh
case "$2" in *ensurepip*) exit 1 ;; esac
echo 3.99
"""


def test_a_bare_machine_is_told_what_was_skipped_and_how_to_get_it(tmp_path: Path) -> None:
    two_tests = ["tests/servers/test_stand_in_memory.py", "-k", "memory_comes or takes_memory"]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *two_tests],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = told.stdout.splitlines()
    assert told.returncode == 0, told.stdout
    assert "get it: apt-get install --no-install-recommends gcc libc6-dev" in lines
    assert "skipped 2 tests: no gcc" in lines
    assert lines[-1].startswith("=")
    assert " 2 skipped, " in lines[-1]


def find_pythons(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "find-python", *options],
        env=os.environ | {"HOME": str(home), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )


def test_every_python_is_found_once_and_none_is_left_out_in_silence(tmp_path: Path) -> None:
    for number, text in (
        ("3.99.0", WITHOUT_VENV),
        ("3.11.0", f'#!/bin/sh\nexec {sys.executable} "$@"'),
    ):
        python = tmp_path / ".local/share/uv/python" / number / "bin" / "python3"
        python.parent.mkdir(parents=True)
        python.write_text(text)
        python.chmod(0o755)
    told = find_pythons(tmp_path, "--all")
    versions = [line.split()[0] for line in told.stdout.splitlines()]
    assert versions[0] == OWN_VERSION
    assert len(versions) == len(set(versions))
    assert "left out Python 3.99" in told.stderr
    assert find_pythons(tmp_path).stdout.strip() == sys.executable
