"""Keys with limits: which models they may use, and how many of their requests may be open."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests

from tests.support.running import Proxy, fake_model, running, wait_until

#: gunicorn's parser takes it, the plain way does not
OTHER_WAY = {"X_Neutral": "1"}
WAYS = pytest.mark.parametrize("way", [{}, OTHER_WAY], ids=["plain", "framework"])
SLOW = {"token_s": 0.02}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    alice = {"name": "alice", "key": "alice-key", "models": ["short"], "max_in_flight": 2}
    models: dict[str, Any] = {"m": {**fake_model(), "aliases": ["short"]}, "other": fake_model()}
    keys: dict[str, Any] = {"api_keys": [alice, "free-key"], "admin_keys": ["admin-key"]}
    with running(tmp_path_factory.mktemp("keys"), models, **keys) as started:
        yield started


def ask(
    proxy: Proxy, key: str, *, model: str = "m", path: str = "", stream: bool = False, **more: Any
) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}", **more.pop("way", {})}
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return requests.post(
        f"{proxy.url}{path}/v1/chat/completions",
        json={**body, "stream": stream, **more},
        headers=headers,
        stream=stream,
        timeout=120,
    )


class Opened:
    """A stream that is open until it is closed."""

    def __init__(self, proxy: Proxy, **more: Any) -> None:
        self.answer = opened(proxy, **more)
        #: dropping it would close the connection
        self.pieces = self.answer.iter_content(None)
        next(self.pieces)

    def close(self) -> None:
        self.answer.close()


def opened(proxy: Proxy, **more: Any) -> requests.Response:
    answer = ask(proxy, "alice-key", stream=True, max_tokens=10_000, fake=SLOW, **more)
    assert answer.status_code == 200, answer.text
    return answer


def workers(proxy: Proxy) -> list[psutil.Process]:
    assert proxy.process is not None
    family = psutil.Process(proxy.process.pid).children(recursive=True)
    guns = [each for each in family if any("gunicorn" in word for word in each.cmdline())]
    return [each for each in guns if each.ppid() in {gun.pid for gun in guns}]


@WAYS
def test_a_key_uses_only_its_models(proxy: Proxy, way: dict[str, str]) -> None:
    assert ask(proxy, "alice-key", way=way).status_code == 200
    for path in ("", "/upstream/other"):
        refused = ask(proxy, "alice-key", model="other", path=path, way=way)
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert error["code"] == "model_not_allowed"
        assert '"alice"' in error["message"]
        assert "short" in error["message"]
        assert "alice-key" not in refused.text
    for key, ids in (("alice-key", ["m"]), ("free-key", ["m", "other"])):
        headers = {"Authorization": f"Bearer {key}", **way}
        listed = requests.get(f"{proxy.url}/v1/models", headers=headers, timeout=60)
        assert [model["id"] for model in listed.json()["data"]] == ids
    one = requests.get(f"{proxy.url}/v1/models/other", headers=headers, timeout=60)
    assert one.status_code == 200
    headers["Authorization"] = "Bearer alice-key"
    one = requests.get(f"{proxy.url}/v1/models/other", headers=headers, timeout=60)
    assert one.status_code == 403


@WAYS
@pytest.mark.parametrize("path", ["", "/upstream/m"])
def test_no_more_requests_of_a_key_are_open_than_may_be(
    proxy: Proxy, path: str, way: dict[str, str]
) -> None:
    streams = [Opened(proxy, path=path, way=way) for _ in range(2)]
    refused = ask(proxy, "alice-key", path=path, way=way)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert '"alice" has 2 requests open' in refused.json()["error"]["message"]
    assert refused.headers["Retry-After"] == "1"
    assert ask(proxy, "free-key", way=way).status_code == 200
    streams.pop().close()
    wait_until(lambda: ask(proxy, "alice-key", way=way).status_code == 200, what="a permit")
    streams.pop().close()


def test_what_a_killed_worker_held_comes_back(proxy: Proxy) -> None:
    wait_until(lambda: ask(proxy, "alice-key").status_code == 200, what="a permit")
    streams = [Opened(proxy), Opened(proxy)]
    assert ask(proxy, "alice-key").status_code == 429
    found = workers(proxy)
    assert found
    for worker in found:
        os.kill(worker.pid, signal.SIGKILL)

    def admitted() -> bool:
        try:
            return ask(proxy, "alice-key").status_code == 200
        except requests.ConnectionError:
            return False

    wait_until(admitted, what="permits of dead workers")
    for stream in streams:
        stream.close()
