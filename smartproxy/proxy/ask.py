"""Ask the manager for something by hand and wait for its word: load, unload, plan.

`ask_manager` blocks, for a command. A worker asks in its loop: no thread waits, what a request for
a load is bounded by (`max_queue`) holds for one by hand, and it ends when its caller goes.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartproxy import doorbell
from smartproxy.catalog.live import Live
from smartproxy.errors import LoadTimeout, ManagerDown, ShuttingDown, StateError, from_code
from smartproxy.lifetime import worker_id
from smartproxy.proxy.ensure import MANAGER_PATIENCE_S, Broker
from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state.manager_row import manager_view
from smartproxy.state.store import Store

LOOK_EVERY_S = 0.02
#: {} where being done is the answer
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the manager is asked."""

    kind: str
    model_id: str
    #: seconds after which no answer is an error
    limit_s: float
    #: how long a manager may give no sign; a killed one is back within a second or two
    patience_s: float = MANAGER_PATIENCE_S


def ask_manager(store: Store, state_dir: Path, question: Question) -> Answer:
    """Return the manager's answer.

    Raises what it answers with, ManagerDown, ShuttingDown or LoadTimeout.
    """
    while True:
        with suppress(_DemandLost):
            return _ask_once(store, state_dir, question)


def _ask_once(store: Store, state_dir: Path, question: Question) -> Answer:
    kind, model_id = question.kind, question.model_id
    worker, now = worker_id(), store.now()
    try:
        demand_id = demand_rows.ask(store, kind, model_id, worker, now=now, explicit=True)
    except StateError as error:
        raise ManagerDown(f"the state file can't be written: {error}") from None
    try:
        doorbell.ring(state_dir, kind.encode())
        return _await(store, worker, demand_id, question)
    finally:
        with suppress(StateError):  # not to be said in place of what happened
            demand_rows.withdraw(store, [demand_id])


async def ask_in_loop(broker: Broker, store: Store, live: Live, question: Question) -> Answer:
    """Return the manager's answer, as `ask_manager`; raises QueueFull too. Cancelled, it withdraws.

    Called in the relay loop.
    """
    while True:
        with suppress(_DemandLost):
            return await _ask_once_in_loop(broker, store, live, question)


async def _ask_once_in_loop(broker: Broker, store: Store, live: Live, question: Question) -> Answer:
    settings = live.settings
    asked = asyncio.ensure_future(
        broker.writer.write(
            lambda: demand_rows.ask(
                store,
                question.kind,
                question.model_id,
                worker_id(),
                now=store.now(),
                explicit=True,
                max_queue=settings.max_queue if question.kind == "load" else None,
            )
        )
    )
    try:
        try:
            # shielded: a caller that goes now leaves a row that must be withdrawn
            demand_id = await asyncio.shield(asked)
        except StateError as error:
            raise ManagerDown(f"the state file can't be written: {error}") from None
        doorbell.ring(settings.state_dir, question.kind.encode())
        broker.held.keep_renewing()
        wait = _Wait(store, demand_id, question)
        while (answer := wait.look()) is None:
            await asyncio.sleep(LOOK_EVERY_S)
        return answer
    finally:
        asked.add_done_callback(broker.withdraw)


def _await(store: Store, worker: str, demand_id: int, question: Question) -> Answer:
    wait, renew_at = _Wait(store, demand_id, question), time.monotonic() + leases.RENEW_S
    while (answer := wait.look()) is None:
        if time.monotonic() > renew_at:
            with suppress(StateError):
                leases.renew(store, worker, now=store.now())
            renew_at = time.monotonic() + leases.RENEW_S
        time.sleep(LOOK_EVERY_S)
    return answer


class _DemandLost(Exception):
    """The question is gone with the state file that it stood in: ask again."""


class _Wait:
    """One question's wait for its answer."""

    def __init__(self, store: Store, demand_id: int, question: Question) -> None:
        self._store = store
        self._demand_id = demand_id
        self._question = question
        self._looked_at = time.monotonic()
        self._deadline = self._looked_at + question.limit_s
        #: since when the manager gives no sign
        self._silent_since: float | None = None

    def look(self) -> Answer | None:
        """Return the answer if it is there. Raises what it says, and what ends the wait.

        A state file that is lost, damaged or being made anew is a manager that gives no sign.
        """
        try:
            answer = demand_rows.read_answers(self._store, [self._demand_id]).get(self._demand_id)
            if answer is not None:
                if answer.error_code:
                    raise from_code(answer.error_code, answer.message or "")
                return answer.answer or {}
            self._look_at_manager()
        except StateError:
            self._store.close()
            self._note(alive=False)
        return None

    def _look_at_manager(self) -> None:
        question, now = self._question, time.monotonic()
        if now > self._deadline:
            raise LoadTimeout(
                f"{question.kind} of '{question.model_id}' was not done after"
                f" {question.limit_s:.0f} s"
            )
        if not demand_rows.is_there(self._store, self._demand_id):
            raise _DemandLost
        view = manager_view(self._store)
        if view.paused_at is not None:
            self._deadline += now - self._looked_at  # the manager loads nothing meanwhile
        self._looked_at = now
        if view.ending():
            raise ShuttingDown("the proxy is being stopped")
        self._note(alive=view.alive(self._store.now()))

    def _note(self, *, alive: bool) -> None:
        """Keep how long the manager has given no sign. Raises ManagerDown."""
        question, now = self._question, time.monotonic()
        if alive:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > question.patience_s:
            raise ManagerDown(f"the manager does not answer; '{question.kind}' was not done")
