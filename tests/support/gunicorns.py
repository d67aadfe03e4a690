"""A real gunicorn with RelayWorker, as a child process of a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.upstreams import wait_until
from tests.support.wire import Wire


@dataclass(frozen=True)
class Gunicorn:
    process: subprocess.Popen[bytes]
    address: tuple[str, int] | str
    log: Path

    def connect(self) -> Wire:
        return Wire(self.address)

    def health(self) -> dict[str, Any]:
        with self.connect() as wire:
            answer = wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n").read_answer()
            assert answer.status == 200
            return dict(answer.json())

    def wait_idle(self) -> None:
        """Wait until no server is held."""
        wait_until(lambda: not self.health()["held"], "all holds released")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


@contextmanager
def gunicorn(
    folder: Path,
    *options: str,
    app: str = "tests.support.relay_app:create_app()",
    env: Mapping[str, str] | None = None,
    unix: bool = False,
) -> Iterator[Gunicorn]:
    """Start gunicorn with our settings and one worker; ends it in any case."""
    address: tuple[str, int] | str
    address = str(folder / "control.sock") if unix else ("127.0.0.1", free_port())
    bind = f"unix:{address}" if isinstance(address, str) else f"{address[0]}:{address[1]}"
    log = folder / "gunicorn.log"
    argv = [sys.executable, "-m", "gunicorn", "-c", "python:smartproxy.proxy.gunicorn_conf"]
    argv += ["--bind", bind, "--workers", "1", "--threads", "4", *options, app]
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **(env or {})}
        )
    started = Gunicorn(process, address, log)
    try:
        wait_until(lambda: _answers(started), f"gunicorn up; its log: {log.read_text()}")
        yield started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
        process.wait(60)


def _answers(started: Gunicorn) -> bool:
    assert started.process.poll() is None, started.log.read_text()
    try:
        if isinstance(started.address, str):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(started.address)
        else:
            socket.create_connection(started.address, timeout=1).close()
    except OSError:
        return False
    return True
