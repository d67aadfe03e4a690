"""Play many seeds: `python -m tests.simulation --seeds 5000`; one again: `--seed 17`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter

from tests.simulation import worlds
from tests.simulation.old_faults import OLD, unmended
from tests.simulation.replaced import replaced
from tests.simulation.story import Kind, play


def main() -> int:
    """Return 1 if a seed broke a rule; its history is printed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one, with its history")
    parser.add_argument("--kind", type=Kind, help="what seeds are rich in: " + ", ".join(Kind))
    parser.add_argument("--without", choices=OLD, help="take the mend of a fault out")
    parser.add_argument("--lines", type=int, default=200, help="lines of a failure's history")
    said = parser.parse_args()
    seeds = [said.seed] if said.seed is not None else range(said.first, said.first + said.seeds)
    began, steps, virtual_s, requests = time.perf_counter(), 0, 0.0, Counter[str]()
    broken: list[tuple[int, str]] = []
    taken_out = unmended(said.without) if said.without else contextlib.nullcontext()
    with replaced(), taken_out:
        for seed in seeds:
            went = play(seed, said.kind)
            steps, virtual_s = steps + went.steps, virtual_s + went.virtual_s
            requests.update(went.requests)
            if went.broken is not None:
                broken.append((seed, went.broken))
                if len(broken) == 1 and said.lines:
                    print("\n".join(went.history.splitlines()[-said.lines :]))
                print(f"seed {seed}: {went.broken}", flush=True)
    took_s = time.perf_counter() - began
    print(
        f"{len(seeds)} seeds in {took_s:.1f} s ({len(seeds) / took_s * 60:.0f} a minute),"
        f" {steps} steps, {virtual_s:.0f} virtual s, {len(broken)} broke a rule"
    )
    print(", ".join(f"{how}: {count}" for how, count in requests.most_common()))
    worlds.forget()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
