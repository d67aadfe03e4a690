"""Start a llama-server (the stand-in or a real one) for a test, talk to it, and end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

from tests.support.fakes.stand_in.journal import read_journal
from tests.support.ports import free_port

T = TypeVar("T")
STAND_IN = Path(__file__).parent / "llama_server.py"


def wait_for(
    look: Callable[[], T], what: str, deadline_s: float = 60.0, every_s: float = 0.005
) -> T:
    """Return the first true answer of `look`; fails naming `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while not (answer := look()):
        assert time.monotonic() < end, f"waited {deadline_s} s in vain for {what}"
        time.sleep(every_s)
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """Return what stands behind `data:`, parsed, `[DONE]` as it is."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass(slots=True, kw_only=True)
class Running:
    """A started server; it need not be ready, nor alive."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    journal: Path
    api_key: str = ""
    _connections: list[HTTPConnection] = field(default_factory=list)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """Ask once on a connection of its own; raises OSError or HTTPException."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            answer = self._send(connection, (method, path, body), headers)
            return Reply(status=answer.status, headers=dict(answer.headers), body=answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, body: object) -> Reply:
        return self.request("POST", path, body)

    def begin(self, path: str, body: object) -> HTTPConnection:
        """Send a request and leave it at that; the caller closes the connection or reads it."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, _encode(body), self._headers({}))
        self._connections.append(connection)
        return connection

    def status(self, path: str = "/health") -> int:
        """Return the HTTP status, 0 while nothing listens."""
        try:
            return self.get(path).status
        except OSError:
            return 0

    def wait_ready(self) -> Running:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return self.status() == 200

        wait_for(ready, "ready")
        return self

    def busy_slots(self) -> int:
        return sum(slot["is_processing"] for slot in self.get("/slots").json())

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").body.decode().splitlines()
        return float(
            next(line.split()[1] for line in lines if line.startswith(f"llamacpp:{name} "))
        )

    def seen(self, event: str) -> list[dict[str, Any]]:
        """Return the stand-in's journal lines of one kind."""
        return read_journal(self.journal, event)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self, deadline_s: float = 20.0) -> int:
        """Wait for the end; returns the exit status (negative: the signal)."""
        return self.process.wait(deadline_s)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _send(
        self, connection: HTTPConnection, what: tuple[str, str, object], headers: dict[str, str]
    ) -> HTTPResponse:
        method, path, body = what
        connection.request(method, path, _encode(body), self._headers(headers))
        return connection.getresponse()

    def _headers(self, more: dict[str, str]) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json"} | key | more


def _encode(body: object) -> bytes | None:
    if body is None or isinstance(body, bytes):
        return body
    return json.dumps(body).encode()


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    binary: Path = STAND_IN,
    model: Path | None = None,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Running]:
    """Start a server in `folder` (model, log and journal there) and kill it at the end.

    The knobs go in as any argument: running(tmp_path, "--fake", "load_s=1").
    """
    folder.mkdir(exist_ok=True)
    model = model or gguf_stub(folder)
    port = port or free_port()
    journal, log = folder / "journal.jsonl", folder / "server.log"
    argv = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    if binary == STAND_IN:
        argv += ["--fake", f"journal={journal}"]
    # the stand-in's `env python3` should find this one at once, not a slow shim
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path} | dict(environment or {})
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, stderr=stderr, stdout=subprocess.DEVNULL, env=env)
    server = Running(process=process, port=port, log=log, journal=journal)
    server.api_key = env.get("LLAMA_API_KEY", "")
    try:
        yield server
    finally:
        server.close()


def gguf_stub(folder: Path) -> Path:
    """Return a file that the stand-in takes for a model."""
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    return path
