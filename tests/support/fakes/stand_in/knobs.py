"""What `--fake KEY=VALUE[,KEY=VALUE...]` may say: the stand-in's bad manners, all off by default.

A key without a value means 1. The same keys (those marked "per request") may stand in a request's
JSON body under "fake": {"token_s": 0.1}; a real llama-server ignores that field.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any


class KnobError(ValueError):
    """The test asked for something the stand-in has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Times in seconds, sizes in bytes; see each line."""

    # --- loading
    #: how long a load takes
    load_s: float = 0.0
    #: what shows meanwhile: "log" (lines on stderr), "cpu" (work, but no line), "none"
    progress: str = "log"
    #: never ready, nothing shows: what a stalled load looks like
    silent_load: bool = False
    #: after load_s, end like this: oom, oom_kv, oom_compute, bad_model, arch, fit, abort, or any
    #: other text, which then stands in the last error line
    fail_load: str = ""
    #: loaded and listening, but /health never answers
    no_health: bool = False
    # --- dying
    #: seconds after being ready
    crash_after_ready_s: float = -1.0
    #: how: abort, oom (CUDA lines, then abort), segv, kill, exit (status 1)
    crash: str = "abort"
    #: per request: on the Nth inference request since the start, before any byte is sent
    crash_on_request: int = 0
    #: per request: after N chunks of a stream (or N tokens of an answer that is not one)
    crash_mid_stream: int = -1
    #: the manners above (fail_load, silent_load, crash_*, hang_on_request) happen only while this
    #: file does not exist, and create it: the next process behaves
    once: str = ""
    # --- answering
    #: per request: seconds between tokens
    token_s: float = 0.0
    #: per request: seconds before the first token (prompt processing)
    first_token_s: float = 0.0
    #: per request: number of tokens where the request does not say max_tokens
    tokens: int = 16
    #: per request: take a slot and never say a word
    hang_on_request: bool = False
    #: per request: answer inference with this status and llama-server's error shape
    status: int = 0
    #: per request: send an error event after N chunks and end without [DONE]
    error_mid_stream: int = -1
    #: per request: break HTTP and close: "early" (not a byte), "garbage" (no HTTP), "length" (a
    #: body shorter than said), and of a stream after 3 chunks: "cut" (no end), "chunk" (no size)
    broken: str = ""
    #: per request: go on generating when the client has left
    stick: bool = False
    #: connections served at a time, further ones wait unread (the real one has a thread pool, and
    #: /health waits behind it too); 0 = no limit; the flag --threads-http sets it as well
    http_threads: int = 0
    #: an idle connection is closed after this long
    keepalive_s: float = 5.0
    # --- stopping
    #: how many SIGTERM (and SIGINT) are ignored, from the first moment on; 1, 2, ... 99
    ignore_term: int = 0
    #: an idle server takes so long from SIGTERM to its end
    slow_exit_s: float = 0.0
    #: one with a request in flight takes so long (the real one: its ping interval, 30)
    term_hang_s: float = 30.0
    #: ends by itself after that, so that a broken test leaves nothing behind
    life_s: int = 900
    # --- memory, in the world of SMARTPROXY_FAKE_NVML (../world.py)
    #: taken on the visible GPUs, divided by --tensor-split; A/B/C = that much of each
    gpu_bytes: str = "0"
    #: taken in so many equal parts over load_s
    gpu_steps: int = 1
    #: how much of each GPU's part is the backend's own: not in the buffers that the log tells
    gpu_overhead_bytes: int = 256 << 20
    #: bytes more of each GPU from the first request on, for good: pools that grow
    gpu_pool_bytes: int = 0
    #: the buffers of the host that the log tells; 0 = no such line
    host_bytes: int = 0
    #: bytes more per request in flight, given back after it
    gpu_request_bytes: int = 0
    #: NVML shows it as used for so long after the end of the process
    free_lag_s: float = 0.0
    #: refuse to load when a visible GPU has less free than this, whatever gpu_bytes says
    oom_if_less_than_free: int = 0
    # --- telling
    #: file that gets one JSON object a line of what the stand-in saw; see journal.py
    journal: str = ""

    def misbehaves(self) -> bool:
        """Say whether a manner guarded by `once` may happen now, and use it up."""
        if not self.once:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True

    def may_misbehave(self) -> bool:
        """The same without using it up."""
        return not (self.once and os.path.exists(self.once))


_TYPES = {entry.name: entry.type for entry in fields(Knobs)}
_REQUEST_KNOBS = frozenset(
    {"crash_on_request", "crash_mid_stream", "token_s", "first_token_s", "tokens"}
    | {"hang_on_request", "status", "error_mid_stream", "stick", "broken"}
)


def parse_knobs(texts: list[str]) -> Knobs:
    """Return the knobs of all `--fake` arguments together; raises KnobError."""
    values: dict[str, Any] = {}
    for pair in (pair for text in texts for pair in text.split(",") if pair):
        key, _, value = pair.partition("=")
        values[key] = _convert(key, value or "1")
    return Knobs(**values)


def for_request(knobs: Knobs, overrides: object) -> Knobs:
    """Return the knobs with a request body's "fake" object laid over them; raises KnobError."""
    if not isinstance(overrides, dict):
        return knobs
    unknown = set(overrides) - _REQUEST_KNOBS
    if unknown:
        raise KnobError(f"not a request knob: {', '.join(sorted(unknown))}")
    return replace(knobs, **{key: _convert(key, str(overrides[key])) for key in overrides})


def _convert(key: str, value: str) -> Any:
    if key not in _TYPES:
        raise KnobError(f"no such knob: {key}")
    kind = str(_TYPES[key])
    try:
        if kind == "bool":
            return {"1": True, "True": True, "0": False, "False": False}[value]
        return {"float": float, "int": int, "str": str}[kind](value)
    except (KeyError, ValueError):
        raise KnobError(f"{key} wants a {kind}, not {value!r}") from None
