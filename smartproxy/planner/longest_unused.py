"""Among servers that cost about the same, the least recently used makes room.

Input: the cheapest set of victims, and all that may be chosen. Output: a set in which no victim can
be exchanged for a server that was not used for longer, at about the same cost. Pure.

Costs contain load times, and those differ by chance: by a lot where the machine is busy. "About the
same" between any two servers would not be a rule, for a chain of small differences makes a big one.
So the cheapest set is the yardstick: each of its victims has a seat, and whoever sits there in the
end, after however many exchanges, costs at most ABOUT_THE_SAME more than that victim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from smartproxy.planner.place import PlaceQuery, find
from smartproxy.planner.victims import Victim, pruned, with_gains

#: part by which costs may differ and still count as about the same. Where the least swap costs 20 s
#: (evict.SWAP_S), chance may add 3 s to a load. Chosen on simulated traces too (docs/placing.md).
ABOUT_THE_SAME = 0.15
#: exchanges tried one after the other in vain where the model goes over several GPUs: whether it
#: fits is a dear question then
_TRIES_OVER_SEVERAL = 8

#: whether these victims do as well as the cheapest
_Enough = Callable[[Sequence[Victim]], bool]


def longest_unused(
    cheapest_set: tuple[Victim, ...],
    victims: Sequence[Victim],
    *,
    query: PlaceQuery | None,
    capacity: Sequence[int],
    places: int,
) -> tuple[Victim, ...]:
    """Return the set with each victim exchanged for a longer unused server, where one will do.

    As with the cheapest set, every victim is necessary, and the model goes on no more GPUs. The
    arguments are those of `cheapest`, and what it returned.
    """
    most_gpus = _gpu_count(query, capacity, cheapest_set)
    enough = _as_good_as(query, capacity, places, most_gpus)
    tries = _TRIES_OVER_SEVERAL if most_gpus > 1 else None
    by_use = sorted(victims, key=lambda v: (v.server.last_used_at, v.server.server_id))
    limits = {victim.server.server_id: victim.cost + victim.tolerance for victim in cheapest_set}
    chosen, going_on = cheapest_set, True
    # comes to an end: every exchange puts an older last use in the place of a newer one
    while going_on:
        going_on = False
        for newer, older in islice(_exchanges(chosen, by_use, limits), tries):
            after = [older if one is newer else one for one in chosen]
            if enough(after):
                limits[older.server.server_id] = limits[newer.server.server_id]
                chosen, going_on = pruned(after, enough), True
                break
    return chosen


def _exchanges(
    chosen: Sequence[Victim], by_use: Sequence[Victim], limits: Mapping[int, float]
) -> Iterator[tuple[Victim, Victim]]:
    """Yield each victim with each server that was not used for longer and is not too dear for it.

    The victim used last first, and with it the longest unused first. limits: by server id, what may
    sit in a victim's seat. by_use: all that may be chosen, sorted by last use.
    """
    for newer in sorted(chosen, key=lambda v: -v.server.last_used_at):
        limit = limits[newer.server.server_id]
        for older in by_use:
            if older.server.last_used_at >= newer.server.last_used_at:
                break
            if older.cost <= limit and all(older is not victim for victim in chosen):
                yield newer, older


def _gpu_count(query: PlaceQuery | None, capacity: Sequence[int], gone: Sequence[Victim]) -> int:
    """Return over how many GPUs a model goes once these are gone; 0: none, or it doesn't fit."""
    fit = find(query, with_gains(capacity, gone)) if query else None
    return len(fit.sites) if fit else 0


def _as_good_as(
    query: PlaceQuery | None, capacity: Sequence[int], places: int, most_gpus: int
) -> _Enough:
    """Return the question whether victims free the places, and memory on no more GPUs than that."""
    if query is None:
        return lambda victims: len(victims) >= places
    positions = [site.position for site in query.sites]
    alone = query.sizes.single_bytes(query.shape)

    def enough(victims: Sequence[Victim]) -> bool:
        if len(victims) < places:
            return False
        after = with_gains(capacity, victims)
        if most_gpus == 1:  # spares the dear question
            return any(after[position] >= alone for position in positions)
        return 0 < _gpu_count(query, capacity, victims) <= most_gpus

    return enough
