"""An asyncio event loop whose time and turns are the scheduler's."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import events
from collections.abc import Callable
from typing import Any

from tests.simulation.scheduler import Event, Scheduler


class Turns:
    """In the place of a selector: waits in virtual time for a timer or another task's call."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.called = Event(scheduler)
        #: called between two rounds of the loop
        self.between: Callable[[], None] = lambda: None

    def select(self, timeout_s: float | None) -> list[Any]:
        if timeout_s is None or timeout_s > 0:
            self.called.wait(timeout_s)
        else:
            self._scheduler.pause()
        self.called.clear()
        self.between()
        return []


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs in one task; others reach it by call_soon_threadsafe."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self.turns = self._selector = Turns(scheduler)
        self.complaints: list[dict[str, Any]] = []

    def time(self) -> float:
        return self._scheduler.now

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing comes from outside but calls."""

    def _write_to_self(self) -> None:
        self.turns.called.set()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complaints.append(context)
        self._scheduler.note("loop: %s %r", context.get("message"), context.get("exception"))

    def turn(self) -> None:
        """Make one round: all that is ready, then wait."""
        events._set_running_loop(self)
        try:
            self._run_once()  # type: ignore[attr-defined]
        finally:
            events._set_running_loop(None)

    def give_up(self) -> None:
        """End without a word, as a killed process does: nothing of it runs on."""
        events._set_running_loop(self)
        try:
            for task in asyncio.all_tasks(self):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _close(task)
        finally:
            events._set_running_loop(None)
            self.close()


def _close(task: asyncio.Task[Any]) -> None:
    with contextlib.suppress(BaseException):  # the process is dead: nobody hears of it
        task.get_coro().close()  # type: ignore[union-attr]
