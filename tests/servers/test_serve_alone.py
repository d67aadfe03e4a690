"""Two of them on one state directory, and a manager that hangs: nothing waits without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from smartproxy.serving.guard import PATIENCE_VARIABLE
from tests.support.running import Proxy, fake_model, running


def second_serve(proxy: Proxy, port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "smartproxy.cli", "serve"),
            *("--config", str(proxy.config_path), "--port", str(port)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_second_serve_ends_at_once_with_one_line_and_harms_nobody(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        server = proxy.llama_servers()[0].pid
        second = second_serve(proxy, proxy.port)
        assert second.returncode == 3
        assert [line for line in second.stderr.splitlines() if "runs on" in line]
        assert len((second.stdout + second.stderr).splitlines()) == 1
        assert proxy.chat("m").status_code == 200
        assert [each.pid for each in proxy.llama_servers()] == [server]


def test_serve_beside_a_manager_by_itself_gives_up_and_leaves_its_servers(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        server = proxy.llama_servers()[0].pid
        (proxy.state_dir / "serve.lock").unlink()  # as if the manager ran without a `serve`
        second = second_serve(proxy, proxy.port + 1 if proxy.port < 65535 else proxy.port - 1)
        assert second.returncode == 3, second.stderr
        assert "giving up" in second.stderr
        assert [each.pid for each in proxy.llama_servers()] == [server]


def test_a_manager_that_hangs_is_ended_with_its_servers_when_serve_is_gone(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}, env={PATIENCE_VARIABLE: "1"}) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.process is not None
        family = psutil.Process(proxy.process.pid).children(recursive=True)
        family += proxy.llama_servers()
        os.kill(proxy.manager_pid(), signal.SIGSTOP)
        proxy.process.kill()
        proxy.process.wait(60)
        began = time.monotonic()
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == [], time.monotonic() - began
