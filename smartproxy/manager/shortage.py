"""A load that ran out of GPU memory: raise what its model is taken to need, and try once more.

The server asked for more than it was promised, or somebody else took what was promised to it after
the last look. In the first case the model's need is raised, for as long as this manager runs (what
is measured of a load that succeeds is kept longer: measure.py); in the second the fresh look alone
changes the next decision. Either way the load is planned anew, with evictions if need be; a
second death in a row is its failure, told with the numbers.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import partial

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.errors import LoadFailed
from smartproxy.llama.out_of_memory import asked_bytes
from smartproxy.manager import needs
from smartproxy.manager.context import Ahead, Preload, Tools
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.lingering import PATIENCE_S, Lingering
from smartproxy.manager.served import loaded_of, options_key
from smartproxy.memory.estimate import Loaded
from smartproxy.memory.types import Estimate, Layout, Need
from smartproxy.planner.reasons import gb
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import AssignmentRow, assignments
from smartproxy.state.store import Store
from smartproxy.types import MIB, ServerState

#: what an estimate that proved too low is raised by at least: this share, and these bytes
LEAST_RAISE = 0.1
LEAST_RAISE_BYTES = 128 * MIB
LOOK_EVERY_S = 0.02


class OutOfGpuMemory(LoadFailed):
    """A server died for want of GPU memory while loading; carries its log."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A model that ran out of GPU memory while loading."""

    #: what it needs of each GPU beyond its estimate
    raised_bytes: int = 0
    #: a load that died of it is being tried once more
    trying_again: bool = False


class Shortages:
    """The models that ran out of GPU memory while loading. Any thread may use it."""

    def __init__(self, preload: Preload) -> None:
        #: where a model goes that nobody else asks for again
        self.preload = preload
        self._lock = threading.Lock()
        #: written under the lock: by the thread that loads the model, which is one at a time
        self._by_model: dict[str, Shortage] = {}

    def get(self, model_id: str) -> Shortage:
        """Return what is known of a model; nothing raised where it never ran out."""
        with self._lock:
            return self._by_model.get(model_id, Shortage())

    def raised(self, model_id: str, facts: Facts) -> Facts:
        """Return what is known of a model with its need as the last load of it has shown it."""
        raised_bytes = self.get(model_id).raised_bytes
        return replace(facts, need=_raised(facts.need, raised_bytes)) if raised_bytes else facts

    def put(self, model_id: str, shortage: Shortage) -> None:
        """Remember it in place of what was known of the model."""
        with self._lock:
            self._by_model[model_id] = shortage

    def settled(self, model_id: str) -> None:
        """Say that a model has loaded or failed: its next shortage may be tried again once more."""
        with self._lock:
            if model_id in self._by_model:
                known = self._by_model[model_id]
                self._by_model[model_id] = replace(known, trying_again=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A server that ran out of GPU memory while loading; its process has ended."""

    server_id: int
    spec: ModelSpec
    error: OutOfGpuMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the files of a model and its earlier loads say."""

    need: Need
    loaded: Loaded
    #: names all that memory depends on besides the layout (served.options_key)
    options_key: str


def facts_of(tools: Tools, spec: ModelSpec) -> Facts:
    """Return what is known of a model. Blocks for as long as its file system does.

    Raises LoadFailed or MetadataError: why it can't be known.
    """
    loaded = loaded_of(tools.store, spec)
    return Facts(
        need=needs.need_of(tools, spec),
        loaded=loaded,
        options_key=options_key(spec, loaded, tools.binary.build),
    )


def ask(ahead: Ahead[Facts], tools: Tools, shortages: Shortages, spec: ModelSpec) -> Facts:
    """Return the same without blocking, its need raised where a load showed it to be too little.

    Raises NotYet besides.
    """
    return shortages.raised(spec.id, ahead.get(spec.id, spec, partial(facts_of, tools, spec)))


def _raised(need: Need, raised_bytes: int) -> Need:
    """Return a need that asks each GPU for so much more, as part of the compute buffer."""

    def estimate(layout: Layout) -> Estimate:
        plain = need.estimate(layout)
        devices = tuple(
            replace(device, compute_bytes=device.compute_bytes + raised_bytes)
            for device in plain.devices
        )
        return replace(plain, devices=devices)

    return replace(need, estimate=estimate)


def try_again(tools: Tools, shortages: Shortages, lingering: Lingering, death: Death) -> bool:
    """End a server that ran out of memory so that its load is planned anew. Blocks for seconds.

    False: it was tried again already, so this is its failure; the caller says so.
    """
    server_id, spec, store = death.server_id, death.spec, tools.store
    before = shortages.get(spec.id)
    if before.trying_again:
        shortages.settled(spec.id)
        return False
    if not _stop(store, server_id, ServerState.STARTING, ServerState.STOPPING, str(death.error)):
        return True  # it was being stopped on purpose
    shares = assignments(store).get(server_id, [])
    _await_memory(tools, lingering, server_id)
    raised_bytes = before.raised_bytes
    taken = _taken_by_others(lingering.view, shares)
    if taken is None:
        raised_bytes += _lacking_bytes(shares, death.error.log)
        why = f"its need is raised by {gb(raised_bytes)} a GPU"
    else:
        why = taken
    shortages.put(spec.id, Shortage(raised_bytes=raised_bytes, trying_again=True))
    if spec.preload:  # nobody else asks again for it
        shortages.preload.add(spec.id)
    reason = f"ran out of GPU memory while loading: {why}; it is tried once more"
    return _stop(store, server_id, ServerState.STOPPING, ServerState.STOPPED, reason)


def numbers(store: Store, view: GpuView, server_id: int) -> str:
    """Return what a failed server was promised, and what its GPUs have free now."""
    free = {gpu.uuid: gpu.free_bytes for gpu in view.gpus}
    parts = [
        f"GPU {share.gpu_index} was to give {gb(share.estimated_bytes)} and has"
        f" {gb(free.get(share.gpu_uuid, 0))} free now"
        for share in assignments(store).get(server_id, [])
    ]
    return "; ".join(parts)


def _stop(
    store: Store, server_id: int, before: ServerState, after: ServerState, reason: str
) -> bool:
    return server_rows.transition(store, server_id, before, after, now=store.now(), reason=reason)


def _await_memory(tools: Tools, lingering: Lingering, server_id: int) -> None:
    """Block until what the dead server held is back, so that the GPUs' numbers are the others'."""
    deadline = time.monotonic() + PATIENCE_S + 1
    while lingering.waits_for(server_id) and time.monotonic() < deadline:
        if tools.stopping.is_set():
            return
        tools.poke()
        time.sleep(LOOK_EVERY_S)


def _taken_by_others(view: GpuView, shares: list[AssignmentRow]) -> str | None:
    """Return which GPU no longer has what was promised, None where all have."""
    gpus = {gpu.uuid: gpu for gpu in view.gpus}
    for share in shares:
        gpu = gpus.get(share.gpu_uuid)
        if gpu is not None and gpu.free_bytes < share.estimated_bytes:
            return (
                f"of the {gb(share.estimated_bytes)} promised on GPU {gpu.index}"
                f" others have taken all but {gb(gpu.free_bytes)}"
            )
    return None


def _lacking_bytes(shares: list[AssignmentRow], log: str) -> int:
    """Return by how much the GPU that was most too small for it must give more."""
    known = asked_bytes(log, len(shares))
    lacking = [
        max(
            LEAST_RAISE_BYTES,
            int(share.estimated_bytes * LEAST_RAISE),
            size - share.estimated_bytes,
        )
        for share, size in zip(shares, known, strict=True)
    ]
    return max(lacking, default=LEAST_RAISE_BYTES)
