"""The whole manager on one screen: look, decide, act, write what happened.

Runs in the main thread only, whenever something happened and at least once a second. It never
blocks: starting, draining and stopping run in threads, which move rows and poke.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from smartproxy.manager.act import Decided, carry_out
from smartproxy.manager.adopt import carry_on
from smartproxy.manager.answers import answer_plans, answer_settled
from smartproxy.manager.bring_down import notice_exits, unload
from smartproxy.manager.bring_up import Loading
from smartproxy.manager.context import Tools
from smartproxy.manager.failed_gpus import leave_failed_gpus
from smartproxy.manager.snapshot import Sources, idle_too_long, snapshot
from smartproxy.planner.plan import plan
from smartproxy.state.demands import open_demands
from smartproxy.state.manager_row import manager_view


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """Everything: for the tick and the main loop, which alone see all of it."""

    tools: Tools
    loading: Loading
    sources: Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What the main loop does next depends on."""

    #: models wait for room, so that the next pass comes soon
    waiting: bool
    #: seconds that the decision took
    decision_s: float


def tick(manager: Manager, now: float) -> Pass:
    """Make one pass."""
    tools, loading, sources = manager.tools, manager.loading, manager.sources
    notice_exits(loading, now)
    carry_on(loading)
    leave_failed_gpus(loading, loading.view, now)
    # what is being exchanged must not be started, and nobody may ask for what ttl would unload
    paused = manager_view(tools.store).paused_at is not None
    demands = answer_settled(tools, loading.failures, open_demands(tools.store), now)
    for demand in demands:
        if demand.kind == "unload":
            unload(loading, demand.model_id, "unloaded by request", now)
    for model_id, idle_s in [] if paused else idle_too_long(tools, demands, now):
        unload(loading, model_id, f"idle for {idle_s:.0f} s (ttl)", now, only_if_idle=True)
    began = time.perf_counter()
    world = snapshot(sources, demands, now)
    decision = plan(world)
    decided = Decided(decision=decision, took_s=time.perf_counter() - began)
    answer_plans(sources, world, demands, now)
    if paused:
        return Pass(waiting=False, decision_s=decided.took_s)
    carry_out(loading, decided, demands, now)
    return Pass(waiting=bool(decision.waits or decision.evictions), decision_s=decided.took_s)
