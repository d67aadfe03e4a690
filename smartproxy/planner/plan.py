"""What to do now for all waiting loads, and what would happen to one: the planner's two questions.

Input: a Snapshot. Output: a Decision, or an Explanation. Pure: the same snapshot always gives the
same answer.

Loads are served oldest first. One that can't start now gets the memory and the place that are being
freed for it booked (`Ledger.later`), and a younger one may take only what is left beside that. A
load that waits for busy servers holds nothing back at first; once it has waited for FAIR_WAIT_S, it
does, and the busy servers in its way are drained once they were worth their load: they finish what
they have, new requests for them queue behind. So nobody starves, nothing busy is ever stopped, and
models that don't fit together take turns that are longer than their loads.
"""

from __future__ import annotations

from smartproxy.planner import victims
from smartproxy.planner.booking import (
    Cost,
    Work,
    is_idle,
    open_work,
    resident_until,
)
from smartproxy.planner.decide import decide
from smartproxy.planner.types import (
    Decision,
    Evict,
    Refuse,
    Snapshot,
    Start,
    Wait,
)


def plan(snapshot: Snapshot, *, cost: Cost = victims.cost) -> Decision:
    """Return what to do now: one of start, wait or refuse for each waiting load, and evictions."""
    work = open_work(snapshot, cost)
    verdicts = [decide(work, load) for load in snapshot.loads]
    actions = [verdict.action for verdict in verdicts]
    evictions = [eviction for verdict in verdicts for eviction in verdict.evictions]
    return Decision(
        starts=tuple(action for action in actions if isinstance(action, Start)),
        evictions=(*evictions, *_back_to_gpu(work)),
        waits=tuple(action for action in actions if isinstance(action, Wait)),
        refusals=tuple(action for action in actions if isinstance(action, Refuse)),
    )


def _back_to_gpu(work: Work) -> list[Evict]:
    """Return the end of idle servers that are on the CPU only because no GPU was there."""
    if not work.ledger.gpus:
        return []
    return [
        Evict(
            server_id=server.server_id,
            model_id=server.model_id,
            for_model_id=server.model_id,
            reason=f"model '{server.model_id}' runs on the CPU for want of a GPU; now there is one",
        )
        for server in work.snapshot.servers
        if server.on_cpu_for_want_of_gpu
        and is_idle(server)
        and resident_until(work, server) <= work.snapshot.now
        and server.server_id not in work.claimed
    ]
