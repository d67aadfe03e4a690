"""What a proxy's processes take over time: memory, descriptors, threads; rows and log of its file.

A sample is a few reads of /proc and of the state file. A verdict compares the last half of a run
with a level line: what grows there grows for ever, whatever the first half did.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.process_tree import tree_of

MIB = 1 << 20
#: what a line may rise in an hour, over the last half of a run, and still be called level
LEVEL_PER_HOUR = {"rss_mb": 3.0, "descriptors": 2.0, "threads": 2.0}
#: a figure that changes less than this in all is level, however steep its line
NOISE = {"rss_mb": 1.5, "descriptors": 3.0, "threads": 3.0}
#: so many samples that a plot is smooth and a day's file is small
MOST_SAMPLES = 720


@dataclass(slots=True, kw_only=True)
class Vitals:
    """The samples of a run. Times are in seconds since it began."""

    serve_pid: int
    state_file: Path
    #: by process ("manager 1234"), then by figure: points (seconds, value)
    processes: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    #: rows of each table, and MB of the file and of its write-ahead log
    state: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def sample(self, at_s: float) -> None:
        """Look once. A process that ends meanwhile is left out."""
        for name, process in by_role(self.serve_pid).items():
            with contextlib.suppress(psutil.Error), process.oneshot():
                seen = {
                    "rss_mb": process.memory_info().rss / MIB,
                    "descriptors": float(process.num_fds()),
                    "threads": float(process.num_threads()),
                }
                figures = self.processes.setdefault(name, {figure: [] for figure in seen})
                for figure, value in seen.items():
                    figures[figure].append((round(at_s, 1), round(value, 2)))
        for name, value in state_figures(self.state_file).items():
            self.state[name].append((round(at_s, 1), round(value, 3)))

    def as_json(self) -> dict[str, Any]:
        return {"processes": self.processes, "state": self.state, "verdicts": self.verdicts()}

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """Return by process and figure: first, median and last value, slope, and level or not."""
        return {
            name: {figure: verdict(figure, points) for figure, points in figures.items()}
            for name, figures in self.processes.items()
            if len(figures["rss_mb"]) >= 8
        }


def by_role(serve_pid: int) -> dict[str, psutil.Process]:
    """Return the proxy's own processes by what they are and their pid; no llama-servers."""
    found = {}
    for role, pid in tree_of(serve_pid).items():
        with contextlib.suppress(psutil.Error):
            found[f"{role} {pid}"] = psutil.Process(pid)
    return found


def state_figures(path: Path) -> dict[str, float]:
    """Return the rows of every table, and the sizes in MB; {} while the file can't be read."""
    sizes = {"file_mb": path, "wal_mb": path.with_name(f"{path.name}-wal")}
    found = {name: file.stat().st_size / MIB for name, file in sizes.items() if file.exists()}
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        )
        for (table,) in tables.fetchall():
            (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            found[f"rows of {table}"] = float(count)
    return found


def verdict(figure: str, points: list[tuple[float, float]]) -> dict[str, Any]:
    """Say how a figure went, and whether its last half is level."""
    late = points[len(points) // 2 :]
    slope = per_hour(late)
    quarter = len(late) // 2
    rise = statistics.median(y for _, y in late[quarter:]) - statistics.median(
        y for _, y in late[:quarter]
    )
    level = slope <= LEVEL_PER_HOUR[figure] or rise <= NOISE[figure] / 2
    return {
        "first": points[0][1],
        "middle": late[0][1],
        "last": late[-1][1],
        "most": max(y for _, y in points),
        "last_half_per_hour": round(slope, 2),
        "level": level,
    }


def per_hour(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least squares' line through points (seconds, value), per hour."""
    fit = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return fit.slope * 3600
