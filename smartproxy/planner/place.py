"""Find the GPUs where a model fits with the memory there is, and say why those.

Input: a model's sizes, its policy, and bytes that each GPU can give. Output: a Fit, or None. Pure.

A strategy is a function that names sets of GPUs in the order it likes them; the first that fits is
taken. Over several GPUs, the set is always the k that can give most, in that order, biggest first:
whatever fits any other k fits these, so "no fit" is never a matter of having looked at the wrong
set, and more free memory never turns a fit into none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from smartproxy.gpus.types import Gpu
from smartproxy.memory.types import Estimate
from smartproxy.planner.sizes import Shape, Sizes, split
from smartproxy.planner.types import PlacePolicy, PlanSettings, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A GPU as a place for one model."""

    #: in the ledger's lists
    position: int
    gpu: Gpu
    overhead_bytes: int
    #: below gpu_util_threshold
    calm: bool
    #: calm, and its memory in use below gpu_mem_threshold: free for splitting
    vacant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Sites in device order, and the estimate that was checked against each."""

    sites: tuple[Site, ...]
    estimate: Estimate

    def shares(self) -> list[tuple[int, int]]:
        """Return (position, bytes with overhead) per GPU: what gets reserved."""
        return [
            (site.position, device.buffers_bytes + site.overhead_bytes)
            for site, device in zip(self.sites, self.estimate.devices, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceQuery:
    """A model in one shape, and where it may go."""

    sizes: Sizes
    shape: Shape
    #: the GPUs it may use
    sites: tuple[Site, ...]
    strategy: Strategy
    max_gpus: int


#: sets of sites in order of preference, given each site's capacity (by position)
Sets = Callable[[PlaceQuery, Sequence[int]], Iterator[tuple[Site, ...]]]


def sites_for(
    policy: PlacePolicy, gpus: Sequence[Gpu], overheads: Sequence[int], settings: PlanSettings
) -> tuple[Site, ...]:
    """Return the GPUs that a model may use, in NVML index order."""
    sites = []
    for position, (gpu, overhead) in enumerate(zip(gpus, overheads, strict=True)):
        if policy.allowed_uuids is None or gpu.uuid in policy.allowed_uuids:
            calm = gpu.utilization < settings.gpu_util_threshold
            vacant = calm and gpu.used_bytes <= settings.gpu_mem_threshold * gpu.total_bytes
            sites.append(
                Site(position=position, gpu=gpu, overhead_bytes=overhead, calm=calm, vacant=vacant)
            )
    return tuple(sites)


def capacities(sites: Sequence[Site], room: Sequence[int]) -> list[int]:
    """Return, by position, what each site can give for buffers: its room less the overhead."""
    capacity = [-1] * len(room)
    for site in sites:
        capacity[site.position] = room[site.position] - site.overhead_bytes
    return capacity


def find(query: PlaceQuery, capacity: Sequence[int]) -> Fit | None:
    """Return the place that the query's strategy likes best among those that fit."""
    if not any(capacity[site.position] > 0 for site in query.sites):
        return None
    for sites in STRATEGIES[query.strategy](query, capacity):
        fit = fit_on(query, sites, capacity)
        if fit is not None:
            return fit
    return None


def fit_on(query: PlaceQuery, sites: tuple[Site, ...], capacity: Sequence[int]) -> Fit | None:
    """Return the fit over exactly these sites, in this device order, or None."""
    if len(sites) == 1:
        if query.sizes.single_bytes(query.shape) > capacity[sites[0].position]:
            return None
        return Fit(sites=sites, estimate=query.sizes.estimate(query.shape, (1.0,)))
    estimate = split(query.sizes, query.shape, [capacity[site.position] for site in sites])
    return Fit(sites=sites, estimate=estimate) if estimate is not None else None


def _single_gpu_preferred(query: PlaceQuery, capacity: Sequence[int]) -> Iterator[tuple[Site, ...]]:
    """One GPU, calm ones first, the one with most room; else the fewest that fit."""
    order = sorted(query.sites, key=lambda s: (not s.calm, -capacity[s.position], s.position))
    yield from _alone(query, order, capacity)
    yield from _fewest(query, capacity)


def _packed(query: PlaceQuery, capacity: Sequence[int]) -> Iterator[tuple[Site, ...]]:
    """One GPU, calm ones first, the tightest that fits: big holes stay whole; else the fewest."""
    order = sorted(query.sites, key=lambda s: (not s.calm, capacity[s.position], s.position))
    yield from _alone(query, order, capacity)
    yield from _fewest(query, capacity)


def _distribute(query: PlaceQuery, capacity: Sequence[int]) -> Iterator[tuple[Site, ...]]:
    """As many GPUs as allowed, vacant ones first; one only where there is no second."""
    if not several_allowed(query):
        yield from _single_gpu_preferred(query, capacity)
        return
    for sites in (_vacant(query), splittable(query.sites)):
        order = _biggest_first(sites, capacity)
        for count in range(min(query.max_gpus, len(sites)), 1, -1):
            yield order[:count]


STRATEGIES: Mapping[Strategy, Sets] = {
    Strategy.SINGLE_GPU_PREFERRED: _single_gpu_preferred,
    Strategy.PACKED: _packed,
    Strategy.DISTRIBUTE: _distribute,
}


def several_allowed(query: PlaceQuery) -> bool:
    """Return whether the model may be split at all."""
    return most_gpus(query) > 1


def most_gpus(query: PlaceQuery) -> int:
    """Return over how many GPUs the model may be split; 1 or less: not at all."""
    return min(query.max_gpus, len(splittable(query.sites)), query.shape.gpu_layers)


def splittable(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites that may be one of several: a process sees one slice (MIG) of one GPU."""
    return tuple(site for site in sites if not site.gpu.mig)


def _alone(
    query: PlaceQuery, order: Iterable[Site], capacity: Sequence[int]
) -> Iterator[tuple[Site, ...]]:
    needed = query.sizes.single_bytes(query.shape)
    return ((site,) for site in order if capacity[site.position] >= needed)


def _fewest(query: PlaceQuery, capacity: Sequence[int]) -> Iterator[tuple[Site, ...]]:
    if not several_allowed(query):
        return
    everywhere = _biggest_first(splittable(query.sites), capacity)
    vacant = _biggest_first(_vacant(query), capacity)
    layers = query.sizes.layer_sums(query.shape)[-1]
    for count in range(2, min(query.max_gpus, len(everywhere)) + 1):
        # this search asks for fits by the hundred: what can't be is told from the sum alone
        if sum(capacity[site.position] for site in everywhere[:count]) < layers:
            continue
        if count <= len(vacant) < len(everywhere):
            yield vacant[:count]
        yield everywhere[:count]


def _vacant(query: PlaceQuery) -> tuple[Site, ...]:
    return tuple(site for site in splittable(query.sites) if site.vacant)


def _biggest_first(sites: Sequence[Site], capacity: Sequence[int]) -> tuple[Site, ...]:
    return tuple(sorted(sites, key=lambda site: (-capacity[site.position], site.position)))
