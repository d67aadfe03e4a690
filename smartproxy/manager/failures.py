"""Loads that failed: for a while, requests for the model get the same answer at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A load that failed: requests within the back-off get the same answer at once."""

    code: str
    message: str
    #: by the store's clock
    at: float
    #: failures in a row, this one counted
    times: int

    def holds(self, now: float) -> bool:
        """Return whether the back-off still runs; it doubles with every failure in a row."""
        pause_s: float = min(FIRST_BACKOFF_S * 2 ** (self.times - 1), LONGEST_BACKOFF_S)
        return now < self.at + pause_s


class Failures:
    """The last failure of each model since it loaded last. Any thread may use it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: written under the lock, by add and put_back
        self._by_model: dict[str, Failure] = {}

    def get(self, model_id: str) -> Failure | None:
        """Return the last failure of a model; None if its last load succeeded."""
        with self._lock:
            return self._by_model.get(model_id)

    def add(self, model_id: str, code: str, message: str) -> Failure | None:
        """Remember a failed load, for the back-off. Returns the failure before it."""
        with self._lock:
            before = self._by_model.get(model_id)
            times = before.times + 1 if before else 1
            failure = Failure(code=code, message=message, at=self._clock(), times=times)
            self._by_model[model_id] = failure
        return before

    def put_back(self, model_id: str, before: Failure | None) -> None:
        """Make this the last failure of a model again; None: it has none."""
        with self._lock:
            if before is None:
                self._by_model.pop(model_id, None)
            else:
                self._by_model[model_id] = before
