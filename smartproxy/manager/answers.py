"""Answer the demands that need no decision: done already, unknown, or failed a moment ago."""

from __future__ import annotations

from smartproxy.manager.context import Manager
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.demands import Demand
from smartproxy.state.server_row import LiveServer
from smartproxy.types import ServerState


def answer_settled(manager: Manager, demands: list[Demand], now: float) -> list[Demand]:
    """Answer what is settled and return the rest, oldest first."""
    if not demands:
        return []
    live = {row.model_id: row for row in server_rows.live_servers(manager.store)}
    rest = []
    for wish in demands:
        settled, code, message = _settled(manager, wish, live.get(wish.model_id), now)
        if settled:
            demand_rows.answer(manager.store, [wish.id], now=now, error_code=code, message=message)
        else:
            rest.append(wish)
    return rest


def _settled(
    manager: Manager, wish: Demand, row: LiveServer | None, now: float
) -> tuple[bool, str | None, str | None]:
    """Return whether a demand is settled, and the error it is answered with (None: done)."""
    if wish.model_id not in manager.catalog.models:
        return True, "model_not_found", f"no model '{wish.model_id}' is configured"
    if wish.kind == "unload":
        return row is None, None, None
    if wish.kind == "plan":
        return False, None, None
    if row is not None:
        # a request takes the ready server by itself; only a person waits to be told
        return wish.explicit and row.state == ServerState.READY, None, None
    failure = manager.failures.get(wish.model_id)
    if failure is None:
        return False, None, None
    waited_for_it = wish.asked_at <= failure.at
    if waited_for_it or (failure.holds(now) and not wish.explicit):
        return True, failure.code, failure.message
    return False, None, None
