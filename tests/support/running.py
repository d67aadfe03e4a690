"""A whole proxy for tests: `smartproxy serve` as a user starts it, on free ports, in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import requests

from smartproxy.lifetime import owned_processes
from tests.support.fakes.running import STAND_IN
from tests.support.paths import ROOT
from tests.support.ports import free_pool, free_port
from tests.support.wire import HOSTS

REAL_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEADLINE_S = 60.0
T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], *, within_s: float = DEADLINE_S, what: str = "condition"
) -> T:
    """Return the first true value of a condition; fails the test at the deadline."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def fake_model(**knobs: Any) -> dict[str, Any]:
    """Return the configuration of a model that the stand-in serves with these bad manners."""
    model: dict[str, Any] = {"path": str(REAL_MODEL)}
    if knobs:
        said = ",".join(f"{key}={value}" for key, value in knobs.items())
        model["args"] = ["--fake", said]
    return model


class Proxy:
    """A running `smartproxy serve`."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Any],
        *,
        real: bool = False,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        pool = settings.pop("server_pool", None) or {"size": 4, "port_start": free_pool(4)}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state_dir = folder / "state"
        self.log_path = folder / "serve.log"
        self.config_path = folder / "config.json"
        config: dict[str, Any] = {"models": models, "server_pool": pool, "allowed_hosts": HOSTS}
        if not real:
            config["llama_server"] = str(STAND_IN)
        self.config_path.write_text(json.dumps({**config, **settings}))
        # a process that gets SIGABRT tells what each of its threads is at
        keys = [*settings.get("admin_keys", []), *settings.get("api_keys", [])]
        #: of who is told everything
        self._key = {"X-Api-Key": keys[0]} if keys and isinstance(keys[0], str) else {}
        self._env = {**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Proxy:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "smartproxy.cli", "serve"),
                    *("--config", str(self.config_path), "--port", str(self.port)),
                ],
                cwd=self.folder,
                env=self._env,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.health().get("manager", {}).get("alive"), what="manager alive")
        return self

    def stop(self) -> None:
        """End it in order, and whatever a test left of it."""
        late: list[str] = []
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                late = self._end_late(self.process)
        for left in self.llama_servers():
            left.kill()
        if late:
            print(self.log()[-30_000:])
            pytest.fail(f"`serve` did not end within {DEADLINE_S} s of SIGTERM; left: {late}")

    def _end_late(self, serve: subprocess.Popen[bytes]) -> list[str]:
        """Kill what is left of a proxy that does not end, and return it: pids and command lines.

        Before, every process of ours writes the stack of each of its threads into the log.
        """
        family = [psutil.Process(serve.pid), *psutil.Process(serve.pid).children(recursive=True)]
        left = []
        for process in family:
            with contextlib.suppress(psutil.Error):
                left.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:120]}")
                process.send_signal(signal.SIGABRT)  # see PYTHONFAULTHANDLER
        psutil.wait_procs(family, timeout=5)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        serve.wait(10)
        return left

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        with contextlib.suppress(requests.ConnectionError):
            known = requests.get(f"{self.url}/health", headers=self._key, timeout=30)
            answer: dict[str, Any] = known.json()
            return answer
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        return {}

    def chat(self, model: str, *, stream: bool = False, **more: Any) -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        return requests.post(
            f"{self.url}/v1/chat/completions",
            json={**body, "stream": stream, **more},
            stream=stream,
            timeout=180,
        )

    def post(self, path: str, key: str | None = None, timeout_s: float = 60) -> requests.Response:
        """Ask for an operation (`/api/...`), as a program does and no page of the web can."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return requests.post(self.url + path, headers=headers, timeout=timeout_s)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Read the state file as a person would."""
        with contextlib.closing(sqlite3.connect(self.state_dir / "state.db")) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql)]

    def states(self) -> dict[str, str]:
        """Return the state of each model's newest server."""
        return {r["model_id"]: r["state"] for r in self.rows("SELECT * FROM servers ORDER BY id")}

    def llama_servers(self) -> list[Any]:
        """Return the live llama-server processes of this proxy."""
        return owned_processes(str(self.state_dir))

    def manager_pid(self) -> int:
        pid: int = self.health()["manager"]["pid"]
        return pid


class Streaming:
    """A stream that is open until closed: what makes a server busy."""

    def __init__(self, proxy: Proxy, model: str, chunks: int = 10_000) -> None:
        self.answer = proxy.chat(model, stream=True, max_tokens=chunks, fake={"token_s": 0.02})
        self.lines = self.answer.iter_lines()
        assert next(line for line in self.lines if line).startswith(b"data:")

    def close(self) -> None:
        self.answer.close()


@contextlib.contextmanager
def running(
    folder: Path, models: Mapping[str, Any], *, kind: type[Proxy] = Proxy, **settings: Any
) -> Iterator[Proxy]:
    """Run a proxy for the length of a block; prints its log when the block fails."""
    proxy = kind(folder, models, **settings)
    try:
        yield proxy.start()
    except BaseException:
        if proxy.log_path.exists():
            print(proxy.log()[-8000:])
        raise
    finally:
        proxy.stop()
