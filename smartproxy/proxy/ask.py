"""Ask the manager for something by hand and wait for its word: load, unload, plan. Blocks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smartproxy.errors import LoadTimeout, ManagerDown, ShuttingDown, StateError, from_code
from smartproxy.lifetime import worker_id
from smartproxy.proxy.ensure import MANAGER_PATIENCE_S, send_poke
from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state.manager_row import manager_view
from smartproxy.state.store import Store

LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the manager is asked."""

    kind: str
    model_id: str
    #: seconds after which no answer is an error
    limit_s: float
    #: how long a manager may give no sign; a killed one is back within a second or two
    patience_s: float = MANAGER_PATIENCE_S


def ask_manager(store: Store, state_dir: Path, question: Question) -> dict[str, Any]:
    """Return the manager's answer, {} where being done is the answer.

    Raises what it answers with, ManagerDown, ShuttingDown or LoadTimeout.
    """
    kind, model_id = question.kind, question.model_id
    worker, now = worker_id(), store.now()
    try:
        demand_id = demand_rows.ask(store, kind, model_id, worker, now=now, explicit=True)
    except StateError as error:
        raise ManagerDown(f"the state file can't be written: {error}") from None
    try:
        send_poke(state_dir, kind.encode())
        return _await(store, worker, demand_id, question)
    finally:
        demand_rows.withdraw(store, [demand_id])


def _await(store: Store, worker: str, demand_id: int, question: Question) -> dict[str, Any]:
    deadline, renew_at = time.monotonic() + question.limit_s, time.monotonic() + leases.RENEW_S
    silent_since: float | None = None
    looked_at = time.monotonic()
    while True:
        answer = demand_rows.read_answers(store, [demand_id]).get(demand_id)
        if answer is not None:
            if answer.error_code:
                raise from_code(answer.error_code, answer.message or "")
            return answer.answer or {}
        now = time.monotonic()
        if now > deadline:
            raise LoadTimeout(
                f"{question.kind} of '{question.model_id}' was not done after"
                f" {question.limit_s:.0f} s"
            )
        view = manager_view(store)
        if view.paused_at is not None:
            deadline += now - looked_at  # the manager loads nothing meanwhile
        looked_at = now
        if view.ending():
            raise ShuttingDown("the proxy is being stopped")
        if view.alive(store.now()):
            silent_since = None
        elif silent_since is None:
            silent_since = now
        elif now - silent_since > question.patience_s:
            raise ManagerDown(f"the manager does not answer; '{question.kind}' was not done")
        if now > renew_at:
            leases.renew(store, worker, now=store.now())
            renew_at = now + leases.RENEW_S
        time.sleep(LOOK_EVERY_S)
