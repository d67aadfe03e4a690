"""`smartproxy serve --host unix:/path`: the socket behind an nginx, through starts and stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from smartproxy.proxy.relay.nginx import HOLD_S
from tests.support.nginxes import nginx
from tests.support.running import Proxy, fake_model, running, wait_until
from tests.support.wire import Wire


class BehindNginx(Proxy):
    """A proxy without a port of its own."""

    def health(self) -> dict[str, Any]:
        path = self.folder / "control.sock"
        if not path.exists():
            return {}
        with Wire(str(path)) as wire:
            wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n")
            return dict(wire.read_answer().json())


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
            unloaded = pool.submit(proxy.post, "/api/models/a/unload")
            wait_until(lambda: proxy.states() == {"a": "draining"}, what="draining")
            assert [line for line in events if line][-1] == b"data: [DONE]"
        assert unloaded.result().ok
        assert proxy.states() == {"a": "stopped"}
