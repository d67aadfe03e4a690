"""Slots, the queue before them, and the counters that /slots and /metrics show.

A request takes a slot (first come, first served), makes tokens one by one and gives it back; the
counters only count what really happened.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from tests.support.fakes.stand_in.http import Gone
from tests.support.fakes.stand_in.knobs import Knobs

#: how often a waiting request looks whether its client is still there
LOOK_S = 0.02
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")


class Stopping(Exception):
    """SIGTERM came: the generation ends at once and its client hears nothing more."""


class Slot:
    def __init__(self, slot_id: int, context_size: int) -> None:
        self.id = slot_id
        self.context_size = context_size
        self.task_id = -1
        self.busy = False
        self.prompt_tokens = 0
        self.decoded = 0
        self.max_tokens = 0
        self.stream = False

    def as_json(self) -> dict[str, object]:
        always: dict[str, object] = {
            "id": self.id,
            "n_ctx": self.context_size,
            "speculative": False,
        }
        always["is_processing"] = self.busy
        if self.task_id < 0:
            return always
        remain = self.max_tokens - self.decoded if self.busy else -1
        token = {"has_next_token": self.busy, "has_new_line": False}
        params = {"max_tokens": self.max_tokens, "n_predict": self.max_tokens}
        return always | {
            "id_task": self.task_id,
            "n_prompt_tokens": self.prompt_tokens + self.decoded,
            "n_prompt_tokens_processed": self.prompt_tokens if self.busy else 0,
            "n_prompt_tokens_cache": 0,
            "params": params | {"stream": self.stream, "temperature": 0.8},
            "next_token": [token | {"n_remain": remain, "n_decoded": self.decoded}],
        }


class Engine:
    """All slots of one stand-in; safe to use from every connection's thread."""

    def __init__(self, slots: int, context_size: int) -> None:
        self.slots = [Slot(index, context_size) for index in range(slots)]
        self.stopping = threading.Event()
        self._free = threading.Condition()
        self._queue: deque[object] = deque()
        self._tasks = 0
        self._prompt_tokens = self._prompt_s = self._predicted = self._predicted_s = 0.0
        self._decodes = self._busy_per_decode = self._max_tokens = 0
        self._bucket = [0.0, 0.0, 0.0, 0.0]

    def take_slot(self, gone: Callable[[], bool]) -> Slot:
        """Wait for a slot; raises Gone when the client leaves first, Stopping on SIGTERM."""
        ticket = object()
        with self._free:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or not self._idle():
                    self._free.wait(LOOK_S)
                    self._check(gone)
                slot = self._idle()[0]
            finally:
                self._queue.remove(ticket)
                self._free.notify_all()
            slot.busy = True
            self._tasks += 1
            slot.task_id, slot.decoded, slot.prompt_tokens = self._tasks, 0, 0
            return slot

    def give_back(self, slot: Slot) -> None:
        with self._free:
            slot.busy = False
            self._free.notify_all()

    def in_flight(self) -> int:
        with self._free:
            return sum(slot.busy for slot in self.slots) + len(self._queue)

    def tokens(self, slot: Slot, knobs: Knobs, gone: Callable[[], bool]) -> Iterator[str]:
        """Make slot.max_tokens tokens at their pace, counting them; raises Gone and Stopping."""
        leaves = (lambda: False) if knobs.stick else gone
        self._wait(knobs.first_token_s, leaves)
        self._count_prompt(slot, knobs.first_token_s)
        for index in range(slot.max_tokens):
            self._wait(knobs.token_s, leaves)
            self._count_token(slot, knobs.token_s)
            yield ("" if index == 0 else " ") + _WORDS[index % len(_WORDS)]

    def hang(self, gone: Callable[[], bool]) -> None:
        """Keep quiet until the client leaves (Gone) or SIGTERM comes (Stopping)."""
        self._wait(1e9, gone)

    def _wait(self, seconds: float, gone: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        self._check(gone)
        while (left := deadline - time.monotonic()) > 0:
            self.stopping.wait(min(left, LOOK_S))
            self._check(gone)

    def _check(self, gone: Callable[[], bool]) -> None:
        if self.stopping.is_set():
            raise Stopping
        if gone():
            raise Gone

    def _idle(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.busy]

    def _count_prompt(self, slot: Slot, seconds: float) -> None:
        with self._free:
            self._prompt_tokens += slot.prompt_tokens
            self._prompt_s += seconds
            self._bucket[0] += slot.prompt_tokens
            self._bucket[1] += seconds

    def _count_token(self, slot: Slot, seconds: float) -> None:
        with self._free:
            slot.decoded += 1
            self._predicted += 1
            self._predicted_s += seconds
            self._bucket[2] += 1
            self._bucket[3] += seconds
            self._decodes += 1
            self._busy_per_decode += sum(slot.busy for slot in self.slots)
            self._max_tokens = max(self._max_tokens, slot.prompt_tokens + slot.decoded)

    def metrics_text(self) -> str:
        """Return /metrics; like the real one, looking at it resets the two throughput gauges."""
        with self._free:
            prompt, prompt_s, predicted, predicted_s = self._bucket
            self._bucket = [0.0, 0.0, 0.0, 0.0]
            counters = {
                "prompt_tokens_total": self._prompt_tokens,
                "prompt_tokens_cached_total": 0,
                "prompt_seconds_total": self._prompt_s,
                "tokens_predicted_total": self._predicted,
                "tokens_predicted_seconds_total": self._predicted_s,
                "n_decode_total": self._decodes,
                "n_tokens_max": self._max_tokens,
            }
            gauges = {
                "prompt_tokens_seconds": prompt / prompt_s if prompt_s else 0,
                "predicted_tokens_seconds": predicted / predicted_s if predicted_s else 0,
                "requests_processing": sum(slot.busy for slot in self.slots),
                "requests_deferred": len(self._queue),
                "n_busy_slots_per_decode": self._busy_per_decode / max(1, self._decodes),
            }
        lines = [_metric(name, "counter", value) for name, value in counters.items()]
        lines += [_metric(name, "gauge", value) for name, value in gauges.items()]
        return "".join(lines)


def _metric(name: str, kind: str, value: float) -> str:
    full = f"llamacpp:{name}"
    help_line = f"# HELP {full} {name.replace('_', ' ')}"
    shown = f"{value:.0f}" if value == int(value) else f"{value:g}"
    return f"{help_line}\n# TYPE {full} {kind}\n{full} {shown}\n"
