"""The data path's figures: what they are called, their spread, and as multiples of a peer's."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

PEERS = ("llama.cpp router", "LiteLLM")

#: each figure's title
FIGURES = {
    "requests_per_s": "requests/s, 16 connections",
    "cpu_us_per_request": "proxy CPU per request, us",
    "first_byte_p50_us": "time to first byte, 1 client, p50, us",
    "first_byte_p99_us": "the same, p99",
    "first_byte_16_p50_us": "time to first byte, 16 clients, p50, us",
    "first_byte_16_p99_us": "the same, p99",
    "added_p50_us": "added to direct, 1 client, p50, us",
    "added_16_p50_us": "added to direct, 16 clients, p50, us",
    "cpu_s_per_100k_chunks": "CPU s per 100k chunks, 64 streams at 100/s",
    "chunks_per_s": "chunks/s at full speed, 32 streams",
    "full_cpu_s_per_100k_chunks": "CPU s per 100k chunks at full speed",
    "at_once_first_byte_p99_ms": "512 streams at once: p99 to first byte, ms",
    "at_once_pss_mb": "512 streams at once: memory (PSS), MB",
    "at_once_data_pss_mb": "the same, without serve, guard and manager",
    "at_once_cpu_s": "512 streams at once: CPU s (60 tokens each)",
    "idle_pss_mb": "2000 idle streams: memory (PSS), MB",
    "real_first_byte_p50_us": "real model, one token, p50, us",
    "errors": "answers that were not right",
}


def names(rounds: list[dict[str, Any]]) -> list[str]:
    return [name for name, value in rounds[0].items() if isinstance(value, dict)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        figure: {
            name: spread([one[name][figure] for one in rounds])
            for name in names(rounds)
            if all(figure in one[name] for one in rounds)
        }
        for figure in FIGURES
    }


def ratios(rounds: list[dict[str, Any]], peer: str) -> dict[str, dict[str, Any]]:
    """Return every figure as a multiple of a peer's, taken round by round."""
    return {
        figure: {
            name: spread([one[name][figure] / one[peer][figure] for one in rounds])
            for name in names(rounds)
            if all(figure in one[name] and one[peer].get(figure, 0) > 0 for one in rounds)
        }
        for figure in FIGURES
        if figure != "errors"
    }


def machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpus if "model name" in line), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def table(result: Mapping[str, Any]) -> str:
    sides = names(result["rounds"])
    rows = [
        [title, *(cell(result["figures"][figure].get(side)) for side in sides)]
        for figure, title in FIGURES.items()
        if result["figures"][figure]
    ]
    parts = [tabulate(rows, ["median (min-max)", *sides])]
    for peer, found in result["ratios"].items():
        rows = [
            [FIGURES[figure], *(cell(of.get(side)) for side in sides)]
            for figure, of in found.items()
            if of
        ]
        parts.append(tabulate(rows, [f"times {peer}", *sides]))
    return "\n\n".join(parts)


def cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['median']:.3g} ({value['min']:.3g}-{value['max']:.3g})"
