"""A model's file system that hangs, and a header that lies, stop nobody else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.fakes.clock import FakeClock
from tests.support.running import REAL_MODEL, fake_model, running, wait_until


def test_a_file_system_that_hangs_stops_neither_other_models_nor_the_end(tmp_path: Path) -> None:
    machine = FakeClock(tmp_path)
    hung = tmp_path / "hung.gguf"
    hung.symlink_to(REAL_MODEL)
    models = {"hung": {"path": str(hung)}, "ok": fake_model()}
    machine.hang("hung.gguf")
    with running(tmp_path, models, env=machine.environment) as proxy, ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(proxy.chat, "hung"), pool.submit(proxy.chat, "hung")
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 2, what="both wait")
        assert proxy.chat("ok").status_code == 200
        assert proxy.health()["status"] == "ok"
        machine.go_on()
        assert first.result().status_code == 200
        assert second.result().status_code == 200
        requested = proxy.rows("SELECT count(*) AS number FROM servers")
        assert requested == [{"number": 2}]


def test_the_end_does_not_wait_for_a_file_system(tmp_path: Path) -> None:
    machine = FakeClock(tmp_path)
    hung = tmp_path / "hung.gguf"
    hung.symlink_to(REAL_MODEL)
    machine.hang("hung.gguf")
    models = {"hung": {"path": str(hung)}}
    with running(tmp_path, models, env=machine.environment) as proxy, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(proxy.chat, "hung")
        wait_until(lambda: proxy.rows("SELECT 1 FROM demands"), what="it waits")
        proxy.stop()
        assert waiting.result().json()["error"]["code"] == "shutting_down"
