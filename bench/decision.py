"""How long a decision takes: `python -m bench.decision [--json FILE] [--worlds N]`.

Generated machines with 8 GPUs, 200 models and 50 of them loaded; one to three loads wait. Times one
call of `plan` each, the estimates of the waiting models included, nothing remembered from an
earlier call. Beside wall time there is the thread's own, which a shared machine disturbs less. The
table says what was decided, so that a case is known to be the one it names.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import click
from tabulate import tabulate

from bench import crowded
from bench.crowded import Listed, machine, waiting, with_loads
from smartproxy.planner.plan import plan
from smartproxy.planner.types import Decision, Snapshot
from smartproxy.types import GIB

SEED = 5
World = Callable[[Random, Sequence[Listed]], Snapshot]


def fits(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(20, 40), busy=0.3)
    return with_loads(world, waiting(_absent(random, models, (0.5, 12))))


def needs_eviction(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(0, 1), busy=0.3)
    return with_loads(world, waiting(_absent(random, models, (2, 12))))


def split(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(10, 24), busy=0.3)
    return with_loads(world, waiting(_absent(random, models, (30, 60))))


def split_and_eviction(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(0, 3), busy=0.1)
    return with_loads(world, waiting(_absent(random, models, (30, 60))))


def auto_context(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(8, 24), busy=0.3)
    return with_loads(world, waiting(_absent(random, models, (0.5, 9)), auto_context=True))


def auto_context_and_eviction(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(0, 1), busy=0.3)
    return with_loads(world, waiting(_absent(random, models, (2, 9)), auto_context=True))


def too_big(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, models[:LOADED], lambda: random.uniform(0, 0.2), busy=0.3)
    loads = waiting(models[-random.randint(1, 3) :])
    alone = replace(loads[0].policy, max_gpus=random.randint(1, 2))
    return with_loads(world, [replace(load, policy=alone) for load in loads])


def everything_busy(random: Random, models: Sequence[Listed]) -> Snapshot:
    world = machine(random, _small(random, models), lambda: random.uniform(0, 1), busy=1.0)
    asked_s = random.choice((1.0, 60.0))
    return with_loads(world, waiting(_absent(random, models, (2, 60)), asked_s=asked_s))


LOADED = crowded.LOADED
CASES: dict[str, World] = {
    "fits": fits,
    "needs eviction": needs_eviction,
    "split": split,
    "split, needs eviction": split_and_eviction,
    "auto context": auto_context,
    "auto context, needs eviction": auto_context_and_eviction,
    "too big": too_big,
    "everything busy": everything_busy,
}


def _small(random: Random, models: Sequence[Listed]) -> list[Listed]:
    """Return the models that are loaded: 50 of the smaller half."""
    return random.sample(models[: len(models) // 2], LOADED)


def _absent(
    random: Random, models: Sequence[Listed], between_gb: tuple[float, float]
) -> list[Listed]:
    """Return one to three models of a size; those of the larger half are never loaded."""
    low, high = (int(size * GIB) for size in between_gb)
    absent = [model for model in models[len(models) // 2 :] if low <= model.bytes <= high]
    return random.sample(absent, random.randint(1, 3))


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write results here.")
@click.option("--worlds", default=500, show_default=True, help="Machines per case.")
def main(json_file: Path | None, worlds: int) -> None:
    """Print how long decisions take."""
    rows = list(measure(worlds))
    click.echo(tabulate(rows, headers="keys", floatfmt=".2f"))
    if json_file is not None:
        json_file.write_text(json.dumps({"decision": rows}, indent=2) + "\n")


def measure(worlds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per case: milliseconds of one call, and what was decided."""
    random = Random(SEED)
    models = crowded.catalogue(random)
    for name, make in CASES.items():
        times, cpu_times, outcomes = [], [], Counter[str]()
        for _ in range(worlds):
            world = make(random, models)
            gc.collect()
            started, cpu_started = time.perf_counter(), time.thread_time()
            decision = plan(world)
            cpu_times.append(1000 * (time.thread_time() - cpu_started))
            times.append(1000 * (time.perf_counter() - started))
            outcomes.update(_outcome(decision))
        yield {
            "case": name,
            "p50 ms": part(times, 0.5),
            "p99 ms": part(times, 0.99),
            "max ms": max(times),
            "p99 ms of CPU": part(cpu_times, 0.99),
            "decided": ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())),
        }


def part(times: Sequence[float], share: float) -> float:
    """Return the value that this share of all does not exceed."""
    return sorted(times)[math.ceil(share * len(times)) - 1]


def _outcome(decision: Decision) -> Iterator[str]:
    for start in decision.starts:
        yield "split" if len(start.placement.gpus) > 1 else "on one GPU"
    made_room_for = {eviction.for_model_id for eviction in decision.evictions}
    for wait in decision.waits:
        yield "evicts" if wait.model_id in made_room_for else "waits"
    for _ in decision.refusals:
        yield "refused"


if __name__ == "__main__":
    main()
