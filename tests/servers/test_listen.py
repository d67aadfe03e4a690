"""`smartproxy serve --host unix:/path`: the socket behind an nginx, through starts and stops."""

from __future__ import annotations

import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from smartproxy.errors import ConfigError
from smartproxy.proxy.relay.nginx import HOLD_S
from smartproxy.serving.listen import close, listen
from tests.support.nginxes import nginx
from tests.support.running import Proxy, fake_model, running, wait_until
from tests.support.wire import Wire


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


class BehindNginx(Proxy):
    """A proxy without a port of its own."""

    def health(self) -> dict[str, Any]:
        path = self.folder / "control.sock"
        if not path.exists():
            return {}
        with Wire(str(path)) as wire:
            wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n")
            return dict(wire.read_answer().json())


@pytest.mark.servers
def test_serve_behind_nginx_outlives_its_gunicorn(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/control.sock"
    models = {"a": fake_model()}
    with (
        running(tmp_path, models, kind=BehindNginx, host=host) as proxy,
        nginx(tmp_path, host.removeprefix("unix:")) as address,
    ):
        proxy.url = f"http://{address[0]}:{address[1]}"
        assert proxy.chat("a").status_code == 200
        assert proxy.chat("a", stream=True).content.endswith(b"data: [DONE]\n\n")
        assert proxy.process
        (master,) = [
            child
            for child in psutil.Process(proxy.process.pid).children()
            if "gunicorn" in child.cmdline()
        ]
        master.terminate()
        wait_until(lambda: not master.is_running(), what="gunicorn's master gone")
        wait_until(lambda: proxy.chat("a").status_code == 200, what="its successor answers")
    assert not (tmp_path / "control.sock").exists()


@pytest.mark.servers
def test_a_drained_server_finishes_what_nginx_carries(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/control.sock"
    # longer than the hold at the hand-over: after that only the server knows of it
    models = {"a": fake_model(token_s=0.1, tokens=round(2 * HOLD_S / 0.1))}
    with (
        running(tmp_path, models, kind=BehindNginx, host=host) as proxy,
        nginx(tmp_path, host.removeprefix("unix:")) as address,
        ThreadPoolExecutor(1) as pool,
    ):
        proxy.url = f"http://{address[0]}:{address[1]}"
        with proxy.chat("a", stream=True, max_tokens=None) as stream:
            events = stream.iter_lines()
            assert next(events).startswith(b"data: ")
            unload = f"{proxy.url}/api/models/a/unload"
            unloaded = pool.submit(requests.post, unload, timeout=60)
            wait_until(lambda: proxy.states() == {"a": "draining"}, what="draining")
            assert [line for line in events if line][-1] == b"data: [DONE]"
        assert unloaded.result().ok
        assert proxy.states() == {"a": "stopped"}
