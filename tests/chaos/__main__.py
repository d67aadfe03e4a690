"""`python -m tests.chaos --seed N --minutes N --json FILE`: a long run; exits 1 unless clean."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from bench.figures import machine as this_machine
from tests.chaos.driver import Driver, each_once, for_ever
from tests.chaos.fault import FAULTS
from tests.chaos.machine import machine
from tests.chaos.not_yet import NOT_YET
from tests.chaos.report import Report, merged
from tests.support.paths import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--most", type=int, default=1_000_000, help="injections; default no limit")
    parser.add_argument("--json", type=Path, help="where the report is written")
    parser.add_argument("--all", action="store_true", help="also faults that are not mended yet")
    parser.add_argument("--once", action="store_true", help="each fault once")
    parser.add_argument("--not-yet", action="store_true", help="only those that are not mended")
    parser.add_argument("--only", help="faults whose name has this in it")
    parser.add_argument("--merge", type=Path, nargs="+", help="only show reports as one table")
    options = parser.parse_args()
    if options.merge:
        report = merged([json.loads(path.read_text()) for path in options.merge])
        print(report.table("pipe"))
        print(report.complaints())
        return 0
    faults = for_ever(options.seed, all_of_them=options.all)
    if options.once or options.only:
        once = each_once(options.seed, all_of_them=options.all or bool(options.only))
        wanted = options.only or ""
        faults = iter([one for one in once if wanted in f"{one.subject}: {one.name}"])
    # sent to end us early, it must find the proxy and its file system put away
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.not_yet:
        faults = iter([FAULTS[name] for name in NOT_YET])
    report = Report(options.seed, {**this_machine(), "commit": commit(), "known": len(FAULTS)})
    try:
        with tempfile.TemporaryDirectory(prefix="chaos-") as name, machine(Path(name)) as made:
            driver = Driver(made, report, random.Random(options.seed))
            with contextlib.suppress(KeyboardInterrupt):
                driver.run(islice(faults, options.most), time.monotonic() + options.minutes * 60)
    finally:  # also where the machine could not be set up again after a fault
        if options.json:
            options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        print(report.table())
        print(report.complaints())
    return 0 if report.clean else 1


def commit() -> Any:
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return said.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
