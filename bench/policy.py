"""How well the planner chooses who makes room: `python -m bench.policy [--json FILE] [--seeds N]`.

Runs made-up request traces (bench.traces) through a simulated machine with the real planner
(bench.simulator), once per policy (bench.policies), and compares loads per 1000 requests and how
long requests wait. The formula's numbers were tuned on the traces of seeds 0 to 9; those shown are
of other seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from bench import policies
from bench.bound import fewest_loads, memory_bytes
from bench.simulator import HEADROOM_BYTES, Outcome, Policy, simulate
from bench.traces import KINDS, Trace, make

FIRST_SEED = 100
MACHINES_GB: Mapping[str, tuple[int, ...]] = {
    "24": (24,),
    "24 24": (24, 24),
    "12 16 24 48": (12, 16, 24, 48),
    "2x12 3x24 2x48 80": (12, 12, 24, 24, 24, 48, 48, 80),
}
POLICIES: Mapping[str, Callable[[Trace], Policy]] = {
    "ours": policies.ours,
    "LRU": policies.plain_lru,
    "count LRU": policies.count_lru,
    "evict all": policies.evict_all,
    "GDSF": policies.greedy_dual,
    "told rates": policies.told_popularity,
    "offline": policies.belady,
}
#: they know what nobody can know beforehand
CLAIRVOYANT = {"told rates", "offline"}
Row = dict[str, Any]


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write results here.")
@click.option("--seeds", default=3, show_default=True, help="Traces of each kind and machine.")
@click.option("--requests", "count", default=1500, show_default=True, help="Requests per trace.")
def main(json_file: Path | None, seeds: int, count: int) -> None:
    """Print what policies make of request traces."""
    rows = list(measure(range(FIRST_SEED, FIRST_SEED + seeds), count))
    for title, key in (
        ("loads per 1000 requests", "loads"),
        ("mean wait, s", "mean_wait_s"),
        ("p95 wait, s", "p95_wait_s"),
    ):
        click.echo(f"\n{title}\n")
        click.echo(tabulate(list(_table(rows, key)), headers="keys", floatfmt=".1f"))
    summary = list(summed_up(rows))
    click.echo("\nagainst ours, over all traces\n")
    click.echo(tabulate(summary, headers="keys", floatfmt=".2f"))
    if json_file is not None:
        result = {"traces": rows, "against_ours": summary}
        json_file.write_text(json.dumps(result, indent=1) + "\n")


def measure(seeds: Sequence[int], count: int) -> Iterator[Row]:
    """Yield what every policy makes of each trace."""
    for machine, cards_gb in MACHINES_GB.items():
        for kind in KINDS:
            for seed in seeds:
                trace = make(kind, cards_gb, seed, count)
                yield {"kind": kind, "GPUs, GB": machine, "seed": seed, **compare(trace)}


def compare(trace: Trace) -> Row:
    """Return, per figure, what each policy makes of one trace; loads are per 1000 requests."""
    outcomes = {name: simulate(trace, policy(trace)) for name, policy in POLICIES.items()}
    figures = {name: _figures(outcome) for name, outcome in outcomes.items()}
    row = {key: {name: figures[name][key] for name in figures} for key in figures["ours"]}
    memory = memory_bytes(trace.cards_gb, HEADROOM_BYTES)
    bound = fewest_loads(outcomes["offline"].served, trace.sizes, memory)
    row["loads"]["bound"] = 1000 * bound / len(trace.requests)
    return {"models": len(trace.sizes), **row}


def _figures(outcome: Outcome) -> dict[str, float]:
    waits = sorted(one.began_at - one.asked_at for one in outcome.served)
    return {
        "loads": 1000 * outcome.loads / len(waits),
        "mean_wait_s": statistics.fmean(waits),
        "p95_wait_s": waits[math.ceil(0.95 * len(waits)) - 1],
    }


def _table(rows: Sequence[Row], key: str) -> Iterator[Row]:
    """Yield one line per kind and machine, averaged over the seeds."""
    for machine in MACHINES_GB:
        for kind in KINDS:
            same = [row[key] for row in rows if (row["kind"], row["GPUs, GB"]) == (kind, machine)]
            means = {name: statistics.fmean(one[name] for one in same) for name in same[0]}
            yield {"GPUs, GB": machine, "requests": kind, **means}


def summed_up(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield per policy how many times our loads and waits it has, and how often ours is better."""
    for name in POLICIES:
        if name != "ours":
            loads = [row["loads"][name] / row["loads"]["ours"] for row in rows]
            waits = [row["mean_wait_s"][name] / row["mean_wait_s"]["ours"] for row in rows]
            yield {
                "policy": name,
                "loads": statistics.geometric_mean(loads),
                "mean wait": statistics.geometric_mean(waits),
                "ours loads no more, %": _percent(ratio >= 1 for ratio in loads),
                "ours waits no longer, %": _percent(ratio >= 1 for ratio in waits),
                "ours within 15 %, loads, %": _percent(ratio >= 1 / 1.15 for ratio in loads),
                "ours within 15 %, wait, %": _percent(ratio >= 1 / 1.15 for ratio in waits),
            }


def _percent(answers: Iterator[bool]) -> float:
    every = list(answers)
    return 100 * sum(every) / len(every)


if __name__ == "__main__":
    main()
