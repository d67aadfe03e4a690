"""What one call of `plan` has in hand: the books, who is claimed already, and verdicts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from smartproxy.planner import reasons, shapes, victims
from smartproxy.planner.ledger import LEAVING, Ledger, open_ledger
from smartproxy.planner.place import Fit, PlaceQuery, sites_for
from smartproxy.planner.sizes import Sizes
from smartproxy.planner.types import (
    Evict,
    GpuShare,
    Placement,
    Refuse,
    RunningServer,
    Snapshot,
    Start,
    Wait,
    WaitingLoad,
)
from smartproxy.types import ServerState

#: what an idle server's end costs; see evict.cost
Cost = Callable[[RunningServer, float], float]


@dataclass(slots=True, kw_only=True)
class Work:
    """The working state of one call."""

    snapshot: Snapshot
    ledger: Ledger
    cost: Cost
    #: by model id
    live: dict[str, RunningServer]
    #: servers that a load decided already has chosen to go, or waits for
    claimed: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What happens to one load."""

    action: Start | Wait | Refuse
    evictions: tuple[Evict, ...] = ()
    #: where it goes, now or later, as far as that is known
    placement: Placement | None = None


def open_work(snapshot: Snapshot, cost: Cost = victims.cost) -> Work:
    """Return the state before anything is decided."""
    return Work(
        snapshot=snapshot,
        ledger=open_ledger(snapshot),
        cost=cost,
        live={server.model_id: server for server in snapshot.servers},
    )


def query_of(work: Work, load: WaitingLoad) -> PlaceQuery:
    """Return a load as placing sees it: the whole model, and the GPUs it may use."""
    ledger, policy = work.ledger, load.policy
    sites = sites_for(policy, ledger.gpus, ledger.overhead_bytes, work.snapshot.settings)
    return PlaceQuery(
        sizes=Sizes(need=load.need),
        shape=shapes.whole(load.need, policy),
        sites=sites,
        strategy=policy.strategy,
        max_gpus=policy.max_gpus or len(sites),
    )


def is_idle(server: RunningServer) -> bool:
    """Return whether a server could go without anyone noticing, its age aside."""
    return server.state is ServerState.READY and not server.busy and not server.pinned


def resident_until(work: Work, server: RunningServer) -> float:
    """Return until when a loaded server is safe (min_residency)."""
    since = server.created_at if server.ready_at is None else server.ready_at
    return since + work.snapshot.settings.min_residency_s


def start(work: Work, load: WaitingLoad, placement: Placement, fit: Fit | None = None) -> Verdict:
    """Return a start, booked."""
    work.ledger.take(fit.shares() if fit else (), starts=True)
    return Verdict(action=Start(model_id=load.model_id, placement=placement), placement=placement)


def wait(load: WaitingLoad, reason: str, code: str, placement: Placement | None = None) -> Verdict:
    """Return a wait; booking is up to the caller."""
    action = Wait(model_id=load.model_id, reason=reason, code_at_timeout=code)
    return Verdict(action=action, placement=placement)


def await_coming(
    work: Work, load: WaitingLoad, goal: tuple[Placement, Fit | None], code: str
) -> Verdict:
    """Return a wait for what is on its way out, booked for this load."""
    placement, fit = goal
    work.ledger.take(fit.shares() if fit else (), starts=False)
    leaving = [server for server in work.snapshot.servers if server.state in LEAVING]
    return wait(load, reasons.coming(load.model_id, leaving), code, placement)


def placement_of(load: WaitingLoad, query: PlaceQuery, fit: Fit, room: list[int]) -> Placement:
    """Return a fit as the launcher wants it, overhead filled in. room: free bytes by position."""
    devices = tuple(
        replace(device, overhead_bytes=site.overhead_bytes)
        for device, site in zip(fit.estimate.devices, fit.sites, strict=True)
    )
    return Placement(
        gpus=tuple(
            GpuShare(
                uuid=site.gpu.uuid,
                index=site.gpu.index,
                bytes=size,
                free_bytes=room[site.position],
            )
            for site, (_, size) in zip(fit.sites, fit.shares(), strict=True)
        ),
        layout=fit.estimate.layout,
        estimate=replace(fit.estimate, devices=devices),
        reason=reasons.placed(load.model_id, query, fit, room),
    )
