"""How much each model was used lately: decaying counts, for choosing who makes room.

They belong to the model and outlive its server, and the manager: kept in the state file with the
totals they were counted up to. Source: the totals that /metrics shows (state/counts.py), which
workers and the look at the servers write every second or two.
"""

from __future__ import annotations

from dataclasses import dataclass

from smartproxy.planner.victims import HALF_LIFE_S
from smartproxy.state import counts
from smartproxy.state.counts import Use
from smartproxy.state.store import Store

#: seconds between two counts; they need not be finer than what they are counted from
COUNT_EVERY_S = 1.0


@dataclass(slots=True)
class RecentUse:
    """The manager's counts. Both are written by `count`, in the main thread."""

    uses: dict[str, Use]
    #: Unix seconds
    counted_at: float


def load(store: Store, now: float) -> RecentUse:
    """Return what the file says; use that was never counted is old, and counts for nothing."""
    uses = counts.uses(store)
    for model_id, (requests, tokens) in counts.use_totals(store).items():
        uses.setdefault(
            model_id,
            Use(at=now, requests=0.0, tokens=0.0, total_requests=requests, total_tokens=tokens),
        )
    return RecentUse(uses=uses, counted_at=now)


def count(store: Store, recent: RecentUse, now: float) -> None:
    """Count what was used since the last time and write it down; at most once a second."""
    if now - recent.counted_at < COUNT_EVERY_S:
        return
    recent.counted_at = now
    changed = {}
    for model_id, (requests, tokens) in counts.use_totals(store).items():
        before = recent.uses.get(model_id)
        after = counted(before, requests, tokens, now=now)
        if before is None or (requests, tokens) != (before.total_requests, before.total_tokens):
            changed[model_id] = after
    recent.uses |= changed
    if changed:
        counts.write_uses(store, changed)


def counted(before: Use | None, requests: float, tokens: float, *, now: float) -> Use:
    """Return a use decayed to now, with what came on top. requests, tokens: the new totals."""
    if before is None:
        return Use(
            at=now,
            requests=requests,
            tokens=tokens,
            total_requests=requests,
            total_tokens=tokens,
        )
    old_requests, old_tokens = decayed(before, now)
    return Use(
        at=now,
        requests=old_requests + max(0.0, requests - before.total_requests),
        tokens=old_tokens + max(0.0, tokens - before.total_tokens),
        total_requests=requests,
        total_tokens=tokens,
    )


def decayed(use: Use, now: float) -> tuple[float, float]:
    """Return requests and tokens as they count now."""
    left = 0.5 ** (max(0.0, now - use.at) / HALF_LIFE_S)
    return use.requests * left, use.tokens * left
