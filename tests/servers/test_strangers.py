"""What answers on a server's port must be the server before it is told anything."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smartproxy.llama.listeners import listens
from tests.support.fakes.running import STAND_IN
from tests.support.ports import free_pool
from tests.support.running import fake_model, running, wait_until

#: a server that does not come to its port before a file is there
SLOW_SERVER = """\
#!/bin/sh
case "$*" in *--port*) while [ ! -e {go} ]; do sleep 0.02; done;; esac
exec {python} {stand_in} "$@"
"""
LISTENER = """\
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
input()
"""


class Squatter:
    """Has a port that nobody finds taken, and answers 200 to all once it is told to."""

    def __init__(self, port: int) -> None:
        self.heard: list[bytes] = []
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))

    def answer(self) -> None:
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                self.heard.append(client.recv(65536))
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def close(self) -> None:
        self._socket.close()


def test_who_listens_is_told_from_whose_socket_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        assert listens(os.getpid(), port)
    assert not listens(os.getpid(), port)
    child = subprocess.Popen(
        [sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert listens(child.pid, port)
        assert listens(os.getpid(), port)  # of a wrapper around it
        with socket.create_server(("127.0.0.1", 0)) as ours:
            assert not listens(child.pid, ours.getsockname()[1])
        child.kill()


def test_a_stranger_on_the_port_hears_neither_key_nor_prompt(tmp_path: Path) -> None:
    server, go, first = tmp_path / "llama-server", tmp_path / "go", free_pool(1)
    server.write_text(SLOW_SERVER.format(go=go, python=sys.executable, stand_in=STAND_IN))
    server.chmod(0o755)
    stranger = Squatter(first)
    settings = {"server_pool": {"size": 1, "port_start": first}, "llama_server": str(server)}
    with running(tmp_path, {"m": fake_model()}, **settings) as proxy, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(proxy.chat, "m")
        wait_until(lambda: proxy.rows("SELECT 1 FROM servers"), what="a port is chosen")
        assert proxy.rows("SELECT port FROM servers") == [{"port": first}]
        stranger.answer()
        wait_until(lambda: "trying port" in proxy.log(), what="another port")
        go.touch()
        assert waiting.result().status_code == 200
        assert proxy.rows("SELECT port FROM servers")[0]["port"] > first
        [row] = proxy.rows("SELECT api_key FROM servers")
        assert stranger.heard
        for heard in stranger.heard:
            assert heard.startswith(b"GET /health")
            assert row["api_key"].encode() not in heard
            assert b"uthorization" not in heard
        stranger.close()


def test_an_adopted_server_whose_port_a_stranger_has_is_ended(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            other = stranger.getsockname()[1]
            old = proxy.manager_pid()
            os.kill(old, signal.SIGSTOP)  # it must not notice before its successor does
            with contextlib.closing(sqlite3.connect(proxy.state_dir / "state.db")) as connection:
                connection.execute("UPDATE servers SET port = ?", (other,))
                connection.commit()
            os.kill(old, signal.SIGKILL)
            wait_until(
                lambda: "is not its llama-server" in proxy.log(), what="the stranger is told"
            )
        assert proxy.chat("m").status_code == 200
        assert proxy.rows("SELECT port FROM servers ORDER BY id DESC")[0]["port"] != other
