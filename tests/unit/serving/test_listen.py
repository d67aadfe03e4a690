"""The address to listen on: a unix socket of its owner and group."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from smartproxy.errors import ConfigError
from smartproxy.serving.listen import close, listen


def test_the_socket_is_for_its_owner_and_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    listener, name = listen(f"unix:{path}", 1)
    assert name == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    close(listener)
    assert not path.exists()


def test_what_a_killed_proxy_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    listener, _ = listen(f"unix:{path}", 1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close(listener)


def test_a_socket_in_use_and_other_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    listener, _ = listen(f"unix:{path}", 1)
    with pytest.raises(ConfigError, match="another process does"):
        listen(f"unix:{path}", 1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close(listener)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="no socket"):
        listen(f"unix:{path}", 1)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", ["control.sock", "/no/such/folder/control.sock", "/" + "x" * 200])
def test_a_path_that_can_not_be_is_one_clear_line(path: str) -> None:
    with pytest.raises(ConfigError, match="can't listen on unix:"):
        listen(f"unix:{path}", 1)
