"""Asking /health as a monitoring tool does: a new connection each time, head and body read."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """One question and what came of it."""

    at: float
    took_s: float
    #: HTTP status; 0: no answer in time
    status: int
    #: "ok" or "degraded"; what went wrong where there was no answer
    said: str

    @property
    def available(self) -> bool:
        return self.status == 200


def poll(port: int, *, timeout_s: float) -> Poll:
    """Ask once. Blocks up to timeout_s for every read; raises nothing."""
    at, began = time.time(), time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read()
        took_s = time.perf_counter() - began
        return Poll(at=at, took_s=took_s, status=answer.status, said=_said(body))
    except (OSError, http.client.HTTPException) as error:
        took_s = time.perf_counter() - began
        return Poll(at=at, took_s=took_s, status=0, said=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def _said(body: bytes) -> str:
    health: dict[str, Any] = json.loads(body)
    return str(health["status"])


def percentile_ms(polls: list[Poll], share: float) -> float:
    """Return the latency below which that share of the polls stayed (1.0: the slowest)."""
    times = sorted(poll.took_s for poll in polls)
    return round(times[min(len(times) - 1, int(len(times) * share))] * 1e3, 2)
