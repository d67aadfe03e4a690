"""The whole manager on one screen: look, decide, act, write what happened.

Runs in the main thread only, whenever something happened and at least once a second. It never
blocks: starting, draining and stopping run in threads, which move rows and poke.
"""

from __future__ import annotations

import time

from smartproxy.manager.act import carry_out, notice_exits, unload
from smartproxy.manager.answer_plans import answer_plans
from smartproxy.manager.answers import answer_settled
from smartproxy.manager.context import Manager
from smartproxy.manager.failed_gpus import leave_failed_gpus
from smartproxy.manager.snapshot import idle_too_long, snapshot
from smartproxy.planner.plan import plan
from smartproxy.state import demands as demand_rows


def tick(manager: Manager, now: float) -> bool:
    """Make one pass. Returns whether models wait for room, so that the next pass comes soon."""
    notice_exits(manager, now)
    leave_failed_gpus(manager, now)
    demands = answer_settled(manager, demand_rows.open_demands(manager.store), now)
    for wish in demands:
        if wish.kind == "unload":
            unload(manager, wish.model_id, "unloaded by request", now)
    for model_id, idle_s in idle_too_long(manager, demands, now):
        unload(manager, model_id, f"idle for {idle_s:.0f} s (ttl)", now, only_if_idle=True)
    began = time.perf_counter()
    view = snapshot(manager, demands, now)
    decision = plan(view)
    manager.decision_s = time.perf_counter() - began
    answer_plans(manager, view, demands, now)
    carry_out(manager, decision, demands, now)
    return bool(decision.waits or decision.evictions)
