"""What a server says of itself over HTTP: whether it is ready, its slots, its counters."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Any

import requests

PROBE_TIMEOUT_S = 2.0


PROBE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


STATUS_BYTES = len(b"HTTP/1.1 200 ")


READY = re.compile(rb"HTTP/1\.[01] 200\b")


def healthy(port: int) -> bool:
    """Return whether the server on a port says it is ready (not: the port is open)."""
    # a plain socket: asked hundreds of times while the machine is busy loading
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_TIMEOUT_S) as sock:
            sock.sendall(PROBE)
            status_line = b""
            while len(status_line) < STATUS_BYTES and (more := sock.recv(64)):
                status_line += more
    except OSError:
        return False
    return READY.match(status_line) is not None


SLOTS_TIMEOUT_S = 2.0


def slots_busy(port: int, api_key: str) -> int | None:
    """Return how many slots a server is using; None when it does not answer. Blocks up to 2 s.

    A build that keeps no such list answers with an error: then 0.
    """
    try:
        answer = requests.get(
            f"http://127.0.0.1:{port}/slots",
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=SLOTS_TIMEOUT_S,
        )
    except requests.RequestException:
        return None
    try:
        return sum(bool(slot.get("is_processing")) for slot in answer.json())
    except (ValueError, AttributeError, TypeError):
        return 0


#: seconds for a server to tell its counters
COUNTERS_TIMEOUT_S = 2.0
METRIC = re.compile(r"^llamacpp:(\w+) ([-+.eE\d]+)$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """A server's own /metrics, by name without `llamacpp:`, and its /slots."""

    metrics: dict[str, float]
    slots: list[dict[str, Any]]


def counters(port: int, api_key: str) -> Counters | None:
    """Return what a server counts; None when it does not answer in time. Blocks up to 4 s."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {api_key}"
    base = f"http://127.0.0.1:{port}"
    try:
        found = METRIC.findall(session.get(f"{base}/metrics", timeout=COUNTERS_TIMEOUT_S).text)
        slots = session.get(f"{base}/slots", timeout=COUNTERS_TIMEOUT_S).json()
    except (requests.RequestException, ValueError):
        return None
    if not found or not isinstance(slots, list):
        return None
    return Counters(metrics={name: float(value) for name, value in found}, slots=slots)
