"""A long run: /health is asked all the time while models load, crash and make room for each other.

`python -m bench.soak --minutes N --json FILE` (`make soak MINUTES=1440` is a day). A proxy of its
own over the stand-in NVML and llama-server; a GPU is lost and comes back now and then, the manager
is killed (`--steady`: it is not, so that what grows is seen). Available is an answer of 200 within
a second; anything else is listed. Memory, descriptors and threads of every process, rows and the
size of the state file's log are sampled (vitals.py); `python -m bench.plot` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families
from tabulate import tabulate

from bench.figures import machine
from bench.polls import Poll, percentile_ms, poll
from bench.vitals import MOST_SAMPLES, Vitals
from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import GIB, WorldFile
from tests.support.ports import free_pool
from tests.support.running import Proxy, fake_model, running

POLL_EVERY_S = 0.1
TIMEOUT_S = 1.0
CLIENTS = 4
#: seconds between two ends of the manager, and between two losses of a GPU
KILL_EVERY_S = 45.0
LOSE_EVERY_S = 60.0
MODELS = {
    **{f"good-{n}": fake_model(gpu_bytes=2 * GIB, load_s=0.3, token_s=0.01) for n in range(3)},
    "large": fake_model(gpu_bytes=6 * GIB, load_s=1.0),
    "crashes": fake_model(gpu_bytes=GIB, crash_on_request=5),
    "dies-alone": fake_model(gpu_bytes=GIB, crash_after_ready_s=2),
    "never-loads": fake_model(fail_load="oom"),
}


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the run has seen so far. Latencies of a day are kept as a sample, failures whole."""

    polls: int = 0
    degraded: int = 0
    failures: list[Poll] = field(default_factory=list)
    sample: list[Poll] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, seen: Poll) -> None:
        self.polls += 1
        self.degraded += seen.said == "degraded"
        if not seen.available:
            self.failures.append(seen)
        if len(self.sample) < 100_000:
            self.sample.append(seen)
        elif (place := random.randrange(self.polls)) < len(self.sample):
            self.sample[place] = seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    parser.add_argument("--minutes", type=float, default=3, help="default 3")
    parser.add_argument(
        "--pause", type=float, default=0.15, help="a client's mean pause in s; default 0.15"
    )
    parser.add_argument("--steady", action="store_true", help="the manager is not killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as name:
        folder = Path(name)
        world = WorldFile(folder / "world", nvml.unequal_pair())
        env = environment(build(folder), world)
        pool = {"size": 3, "port_start": free_pool(3)}
        with running(folder, MODELS, env=env, server_pool=pool, min_residency=1) as proxy:
            result = soak(proxy, world, options)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def soak(proxy: Proxy, world: WorldFile, options: argparse.Namespace) -> dict[str, Any]:
    """Make trouble for so many minutes and return what /health did meanwhile."""
    seconds: float = options.minutes * 60
    assert proxy.process is not None
    ended, tally = threading.Event(), Tally()
    vitals = Vitals(serve_pid=proxy.process.pid, state_file=proxy.state_dir / "state.db")
    work: list[Callable[[], None]] = [
        *([lambda: ask(proxy, tally, ended, options.pause)] * CLIENTS),
        lambda: lose_gpus(world, ended),
        lambda: keep_vitals(vitals, ended, every_s=max(1.0, seconds / MOST_SAMPLES)),
        *([] if options.steady else [lambda: kill_managers(proxy, ended)]),
    ]
    threads = [threading.Thread(target=entry) for entry in work]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while (next_at := time.monotonic() + POLL_EVERY_S) < end:
        tally.add(poll(proxy.port, timeout_s=TIMEOUT_S))
        time.sleep(max(0.0, next_at - time.monotonic()))
    ended.set()
    for thread in threads:
        thread.join()
    return {**report(proxy, tally, seconds), "vitals": vitals.as_json()}


def keep_vitals(vitals: Vitals, ended: threading.Event, *, every_s: float) -> None:
    began = time.monotonic()
    while not ended.wait(every_s):
        vitals.sample(time.monotonic() - began)


def ask(proxy: Proxy, tally: Tally, ended: threading.Event, pause_s: float) -> None:
    """Ask models at random, so that they load, crash and make room."""
    while not ended.wait(random.uniform(0, 2 * pause_s)):
        try:
            answer = proxy.chat(random.choice(list(MODELS)), max_tokens=20)
        except requests.RequestException as error:
            tally.answers[type(error).__name__] += 1
            continue
        tally.answers[answer.headers.get("X-Smartproxy-Error", str(answer.status_code))] += 1


def kill_managers(proxy: Proxy, ended: threading.Event) -> None:
    while not ended.wait(KILL_EVERY_S):
        pid = proxy.health()["manager"]["pid"]
        if pid:
            os.kill(pid, signal.SIGKILL)


def lose_gpus(world: WorldFile, ended: threading.Event) -> None:
    uuid = world.world.gpus[0].uuid
    while not ended.wait(LOSE_EVERY_S):
        world.change_gpu(uuid, lost=True)
        ended.wait(LOSE_EVERY_S / 4)
        world.change_gpu(uuid, lost=False)


def report(proxy: Proxy, tally: Tally, seconds: float) -> dict[str, Any]:
    text = requests.get(f"{proxy.url}/metrics", timeout=30).text
    counted: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "smartproxy_loads_total":
                counted[f"loads: {sample.labels['outcome']}"] += int(sample.value)
            elif sample.name == "smartproxy_evictions_total":
                counted["evictions"] = int(sample.value)
    crashed = "SELECT count(*) AS n FROM events WHERE message LIKE '%ready->failed%'"
    managers = "SELECT count(*) AS n FROM events WHERE message LIKE 'gpu 0 %->error%'"
    return {
        **machine(),
        "minutes": round(seconds / 60, 2),
        "polls": tally.polls,
        "available_percent": round(100 * (1 - len(tally.failures) / max(1, tally.polls)), 4),
        "degraded_polls": tally.degraded,
        "failures": [f"{entry.at:.3f}: {entry.status} {entry.said}" for entry in tally.failures],
        "p50_ms": percentile_ms(tally.sample, 0.5),
        "p99_ms": percentile_ms(tally.sample, 0.99),
        "max_ms": percentile_ms(tally.sample, 1.0),
        **counted,
        "crashes": proxy.rows(crashed)[0]["n"],
        "gpu losses": proxy.rows(managers)[0]["n"],
        "managers killed": proxy.log().count("manager ended with code"),
        "answers": dict(tally.answers.most_common()),
    }


def table(result: dict[str, Any]) -> str:
    lines = [[key, value] for key, value in result.items() if not isinstance(value, dict | list)]
    answers = [[f"requests: {code}", number] for code, number in result["answers"].items()]
    listed = "\n".join(result["failures"][:50])
    vitals = tabulate(
        [
            [name, figure, *said.values()]
            for name, figures in result["vitals"]["verdicts"].items()
            for figure, said in figures.items()
        ],
        ["process", "figure", "first", "middle", "last", "most", "per hour, last half", "level"],
    )
    return f"{tabulate([*lines, *answers], ['soak', ''])}\n\n{vitals}\n{listed}".rstrip()


if __name__ == "__main__":
    main()
