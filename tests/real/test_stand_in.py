"""The real llama-server does what the stand-in is held to: the same tests, on the real one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.servers.test_stand_in import *  # noqa: F403  # every test and its fixtures
from tests.servers.test_stand_in import real_binary
from tests.support.fakes.running import STAND_IN
from tests.support.fakes.stand_in.flags import FLAGS


@pytest.fixture
def server_kind() -> str:
    return "real"


def test_help_names_every_flag_of_the_installed_server() -> None:
    def flags(binary: Path) -> set[str]:
        text = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=20).stdout
        lines = [line for line in text.splitlines() if re.match(r"--?\w", line)]
        heads = [line[:40] if line[38:40] == "  " else line for line in lines]
        return {name for head in heads for name in re.findall(r"(?<!\S)--?[a-z][\w.-]*", head)}

    assert flags(real_binary()) <= flags(STAND_IN)
    assert len(flags(real_binary())) > 200


def test_flags_take_a_value_where_the_installed_server_does() -> None:
    ours = {name: bool(flag.value) for flag in FLAGS for name in flag.spellings}
    asked = ["--alias", "--tensor-split", "--mmproj", "--fit", "-lv", "--n-gpu-layers", "--rpc"]
    asked += ["--metrics", "--kv-unified", "--embedding", "--offline", "--no-webui", "--slots"]
    takes_value = {}
    for name in asked:
        command = [str(real_binary()), name]
        done = (
            subprocess.run(command, capture_output=True, text=True, timeout=3, check=False)
            if ours[name]
            else None
        )
        takes_value[name] = done is not None and "expected value" in done.stderr
    assert takes_value == {name: ours[name] for name in asked}
