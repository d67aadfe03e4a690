"""Setting the machine's clock changes nothing but what people read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smartproxy.lifetime import worker_alive
from tests.servers.test_serve import Streaming, wait_state
from tests.support.fakes.clock import FakeClock
from tests.support.running import fake_model, running, wait_until

HOUR_S = 3600


def test_the_clock_of_a_process_can_be_set(tmp_path: Path) -> None:
    clock = FakeClock(tmp_path)
    clock.set(-HOUR_S)
    said = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"],
        env=clock.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert float(said[0]) < time.time() - HOUR_S / 2
    assert float(said[1]) > time.monotonic() - HOUR_S / 2


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_jump_of_the_clock_is_harmless(jump_s: int, tmp_path: Path) -> None:
    clock = FakeClock(tmp_path)
    models = {
        "busy": fake_model(),
        "idle": {**fake_model(), "ttl": HOUR_S // 2},
        "slow": fake_model(load_s=1),
    }
    with running(tmp_path, models, env=clock.environment) as proxy, ThreadPoolExecutor(1) as pool:
        assert proxy.chat("idle").status_code == 200
        stream = Streaming(proxy, "busy")
        servers = {server.pid for server in proxy.llama_servers()}
        waiting = pool.submit(proxy.chat, "slow")
        wait_state(proxy, "slow", "starting")

        clock.set(jump_s)
        before = proxy.rows("SELECT heartbeat_at FROM manager")[0]["heartbeat_at"]
        assert waiting.result().status_code == 200
        # the manager has looked for the dead and the idle since
        wait_until(
            lambda: proxy.rows("SELECT heartbeat_at FROM manager")[0]["heartbeat_at"] > before + 3,
            what="heartbeats after the jump",
        )
        health = proxy.health()
        assert health["status"] == "ok", health
        assert abs(health["manager"]["heartbeat_age"]) < HOUR_S / 2
        assert proxy.states() == {"busy": "ready", "idle": "ready", "slow": "ready"}
        held = proxy.rows("SELECT worker_id FROM leases WHERE in_flight")
        assert held
        assert worker_alive(held[0]["worker_id"])
        assert servers <= {server.pid for server in proxy.llama_servers()}
        assert next(line for line in stream.lines if line)
        stream.close()
        wait_until(
            lambda: not proxy.rows("SELECT 1 FROM leases WHERE in_flight"), what="given back"
        )

        pid = proxy.manager_pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: proxy.health()["manager"].get("pid") not in (None, pid), what="another")
        assert proxy.chat("idle").status_code == 200
        assert servers <= {server.pid for server in proxy.llama_servers()}
