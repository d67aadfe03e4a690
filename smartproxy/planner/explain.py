"""What would happen to one load, and every GPU as a place for it, for people to read. Pure."""

from __future__ import annotations

from smartproxy.gpus.types import Gpu
from smartproxy.planner import victims
from smartproxy.planner.booking import (
    Verdict,
    Work,
    open_work,
    query_of,
)
from smartproxy.planner.decide import decide
from smartproxy.planner.place import PlaceQuery, Site
from smartproxy.planner.reasons import gb
from smartproxy.planner.types import (
    CandidateGpu,
    Explanation,
    Refuse,
    Snapshot,
    Start,
    Wait,
    WaitingLoad,
)
from smartproxy.types import ServerState


def explain(snapshot: Snapshot, load: WaitingLoad) -> Explanation:
    """Return what would happen to this load now, as the youngest unless it waits already."""
    work = open_work(snapshot, victims.cost)
    for older in snapshot.loads:
        if older.model_id == load.model_id:
            load = older
            break
        decide(work, older)
    gpus = candidates(work, query_of(work, load))
    verdict = decide(work, load)
    loaded = work.live.get(load.model_id)
    ready = loaded is not None and loaded.state is ServerState.READY
    return Explanation(
        model_id=load.model_id,
        action="loaded" if ready else _name(verdict),
        reason=_reason(verdict),
        placement=verdict.placement,
        candidates=gpus,
        evictions=verdict.evictions,
        code=None if ready else _code(verdict),
    )


def _name(verdict: Verdict) -> str:
    if verdict.evictions:
        return "evict"
    return {Start: "start", Wait: "wait", Refuse: "refuse"}[type(verdict.action)]


def _reason(verdict: Verdict) -> str:
    action = verdict.action
    if isinstance(action, Start):
        return action.placement.reason
    return action.reason if isinstance(action, Wait) else action.message


def _code(verdict: Verdict) -> str | None:
    action = verdict.action
    if isinstance(action, Start):
        return None
    return action.code_at_timeout if isinstance(action, Wait) else action.code


def candidates(work: Work, query: PlaceQuery) -> tuple[CandidateGpu, ...]:
    """Return one entry per GPU, in NVML index order, before this load's decision is booked."""
    sites = {site.gpu.uuid: site for site in query.sites}
    positions = {gpu.uuid: position for position, gpu in enumerate(work.ledger.gpus)}
    return tuple(
        _candidate(work, query, gpu, (positions.get(gpu.uuid), sites.get(gpu.uuid)))
        for gpu in work.snapshot.gpus or ()
    )


def _candidate(
    work: Work, query: PlaceQuery, gpu: Gpu, place: tuple[int | None, Site | None]
) -> CandidateGpu:
    position, site = place
    free = later = 0
    if position is not None:
        free, later = work.ledger.room()[position], work.ledger.later[position]
    needed = query.sizes.single_bytes(query.shape) + site.overhead_bytes if site else None
    fits_now = needed is not None and needed <= free
    if gpu.error is not None:
        note = f"in error: {gpu.error}"
    elif site is None or needed is None:
        note = "not allowed (`gpus`)"
    else:
        note = _note(work, site, needed, (free, later))
    return CandidateGpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        free_bytes=free,
        free_later_bytes=later,
        needed_bytes=needed,
        fits_now=fits_now,
        note=note,
    )


def _note(work: Work, site: Site, needed: int, room: tuple[int, int]) -> str:
    free, later = room
    empty = site.gpu.total_bytes - work.snapshot.settings.headroom_bytes
    if needed <= free:
        note = f"fits: {gb(needed)} of {gb(free)}"
    elif needed <= later:
        note = "fits after the memory that is being freed is free"
    elif needed <= empty:
        note = f"no room: {gb(needed)} needed, {gb(max(0, free))} free"
    else:
        note = f"too small for the whole model: {gb(needed)} needed, {gb(empty)} when empty"
    return note if site.calm else f"{note}; busy ({site.gpu.utilization:.0f} % utilisation)"
