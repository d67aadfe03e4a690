"""Pause and resume: new requests queue, what is in flight finishes, and nothing fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from tests.support.openapi import validate
from tests.support.running import Proxy, Streaming, fake_model, running, wait_until

JSON = {"Content-Type": "application/json"}


def by_api(proxy: Proxy, verb: str) -> dict[str, Any]:
    answer = requests.post(f"{proxy.url}/api/{verb}", headers=JSON, timeout=30)
    assert answer.status_code == 200, answer.text
    validate(answer.json(), "Pause")
    return dict(answer.json())


def by_command(proxy: Proxy, verb: str) -> str:
    argv = [sys.executable, "-m", "smartproxy.cli", verb, "--config", str(proxy.config_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout


def chunked(proxy: Proxy, model: str) -> requests.Response:
    """Send a chat that goes gunicorn's and Flask's way."""
    body = json.dumps({"model": model, "messages": [], "max_tokens": 2}).encode()
    return requests.post(
        f"{proxy.url}/v1/chat/completions", data=iter([body]), headers=JSON, timeout=180
    )


def waits(asked: list[Future[requests.Response]]) -> bool:
    return not any(each.done() for each in asked)


def test_while_paused_requests_queue_and_what_is_in_flight_finishes(tmp_path: Path) -> None:
    models = {"m": fake_model(), "n": fake_model()}
    settings = {"queue_timeout": 5, "sse_wait_comment_after": 0.2}
    with running(tmp_path, models, **settings) as proxy, ThreadPoolExecutor(4) as pool:
        assert proxy.chat("m").status_code == 200
        stream = Streaming(proxy, "m", chunks=100)
        since = by_api(proxy, "pause")["paused_at"]
        assert by_api(proxy, "pause")["paused_at"] == since
        asked = [
            pool.submit(proxy.chat, "m"),
            pool.submit(proxy.chat, "n"),
            pool.submit(chunked, proxy, "m"),
        ]
        waiting = proxy.chat("n", stream=True).iter_lines()
        assert next(waiting).startswith(b": waiting")
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        health = proxy.health()
        assert health["manager"]["paused_at"] == since
        assert any("paused since" in reason for reason in health["reasons"])
        wait_until(lambda: time.time() > since + 6, what="longer than queue_timeout")
        assert waits(asked)
        assert proxy.states() == {"m": "ready"}
        assert by_api(proxy, "resume") == {"paused": False, "paused_at": None}
        assert [each.result().status_code for each in asked] == [200, 200, 200]
        assert [line for line in waiting if line][-1] == b"data: [DONE]"
        assert proxy.health()["status"] == "ok"


def test_a_pause_outlives_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy, ThreadPoolExecutor(1) as pool:
        assert by_command(proxy, "pause").startswith("paused")
        since = proxy.health()["manager"]["paused_at"]
        proxy.stop()
        proxy.start()
        assert proxy.health()["manager"]["paused_at"] == since
        asked = [pool.submit(proxy.chat, "m")]
        wait_until(lambda: proxy.rows("SELECT pass_age_s FROM manager"), what="it runs")
        assert waits(asked)
        assert by_command(proxy, "resume").startswith("resumed after")
        assert asked[0].result().status_code == 200
        assert by_command(proxy, "resume").startswith("was not paused")
