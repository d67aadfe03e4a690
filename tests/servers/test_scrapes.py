"""/metrics of a running proxy: one truth, whichever worker answers."""

from __future__ import annotations

from pathlib import Path

import requests

from tests.support.running import Proxy, fake_model, running, wait_until
from tests.support.samples import Samples, parsed, value


def test_every_worker_tells_the_same_whole_truth(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        for _ in range(8):
            assert proxy.chat("m").status_code == 200
        assert proxy.chat("m", fake={"status": 418}).status_code == 418
        assert proxy.chat("nobody").status_code == 404
        wait_until(lambda: _requests(proxy, "m", "200") == 8, what="all are counted")
        # whichever worker answers
        for _ in range(20):
            samples = _scrape(proxy)
            assert value(samples, "requests_total", model="m", code="200") == 8
            assert value(samples, "requests_total", model="m", code="418") == 1
            assert value(samples, "requests_total", model="", code="404") == 1


def test_counts_outlive_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        proxy.stop()
        proxy.start()
        assert _requests(proxy, "m", "200") == 1
        assert value(_scrape(proxy), "loads_total", model="m", outcome="ready") == 1


def test_metrics_want_a_key_where_requests_do(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}, api_keys=["sesame"]) as proxy:
        assert requests.get(f"{proxy.url}/metrics").status_code == 401
        assert requests.get(f"{proxy.url}/status").status_code == 401
        opened = {"Authorization": "Bearer sesame"}
        assert requests.get(f"{proxy.url}/metrics", headers=opened).status_code == 200


def _scrape(proxy: Proxy) -> Samples:
    answer = requests.get(f"{proxy.url}/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def _requests(proxy: Proxy, model: str, code: str) -> float | None:
    return value(_scrape(proxy), "requests_total", model=model, code=code)
