"""Get a request a ready server, or the reason why not. Runs in the worker's relay loop.

From memory while the model is loaded: routes are read again only when the manager changed one, and
a lease is written only when a server goes from idle to busy (held.py). Otherwise: one demand row, a
poke, and waiting until the state file says ready or why not.
"""

from __future__ import annotations

import asyncio
import logging
import time

from smartproxy import doorbell
from smartproxy.catalog.live import Live
from smartproxy.errors import (
    LoadTimeout,
    ManagerDown,
    ShuttingDown,
    SmartProxyError,
    StateError,
    from_code,
)
from smartproxy.lifetime import worker_id
from smartproxy.log import Outage
from smartproxy.proxy.file_watch import Moves
from smartproxy.proxy.held import Held
from smartproxy.proxy.relay.relay import Lease
from smartproxy.proxy.writer import Writer
from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state.leases import Route
from smartproxy.state.manager_row import ManagerView, manager_view
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)

#: a waiting request looks at its deadlines this often, whether the file moves or not
LOOK_ANYWAY_S = 0.25
#: routes may be this old: a server that is leaving waits for its leases, and no lease is written
#: on one that is no longer ready, so that this is only a matter of asking less often
ROUTES_OLD_S = 0.01
#: a killed manager is back within a second or two, on a crowded machine within twenty: who waits is
#: not sent away before
MANAGER_PATIENCE_S = 30.0
#: one that lives and gives no sign waits for a locked file, or for a full disk; `serve` ends one
#: that hangs
STUCK_PATIENCE_S = 75.0
#: a server that just cut a request short is avoided this long; then it is worth a second try
AVOID_S = 2.0
#: the state file may be missing this long before the log says so: at a start the manager makes it
FILE_PATIENCE_S = 5.0


class Broker:
    """One per worker process; all methods but the constructor run in the relay loop."""

    def __init__(self, store: Store, live: Live) -> None:
        self._store = store
        self._live = live
        self._worker = worker_id()
        #: the one thread of this worker that writes to the state file
        self.writer = Writer()
        self.held = Held(store, self._worker, self.writer)
        self._moves = Moves(store)
        #: the manager's row as last read; None: not read yet
        self._manager: ManagerView | None = None
        self._routes: dict[str, Route] = {}
        self._generation = -1
        self._data_version = -1
        self._look_again_at = 0.0
        self._unreadable = Outage(
            logger,
            what="the state file can't be read",
            over="the state file can be read again",
            after_s=FILE_PATIENCE_S,
        )

    async def acquire(self, model_id: str, *, avoid_server_id: int | None = None) -> Lease:
        """Return a hold on a ready server of a model, loading it if need be.

        avoid_server_id: that one just died under the caller. Raises any SmartProxyError of SPEC 2.
        """
        avoid_until = time.monotonic() + AVOID_S
        asked: asyncio.Task[int] | None = None
        try:
            while True:
                if time.monotonic() > avoid_until:
                    avoid_server_id = None
                route = self._ready_route(model_id, avoid_server_id)
                if self._paused():
                    await self._until_resumed()
                elif route is None:
                    if asked is None:
                        asked = asyncio.create_task(self._ask(model_id))
                    # shielded: a client that goes now leaves a row that must be withdrawn
                    demand_id = await asyncio.shield(asked)
                    if not await self._watch(model_id, demand_id, avoid_server_id, avoid_until):
                        asked = None
                elif await self.held.take(route.server_id):
                    return _lease_on(route)
                else:
                    self._generation = -1  # it is no longer ready: read the routes again
        finally:
            # not before the lease is written: a server that nobody seems to want may be evicted
            if asked is not None:
                asked.add_done_callback(self.withdraw)

    def release(self, lease: Lease) -> None:
        """Give a hold back."""
        self.held.release(lease.server_id)

    def _ready_route(self, model_id: str, avoid_server_id: int | None) -> Route | None:
        if self._generation < 0 or time.monotonic() > self._look_again_at:
            self._refresh()
        route = self._routes.get(model_id)
        if route is None or route.state != "ready" or route.server_id == avoid_server_id:
            return None
        return route

    def _refresh(self) -> None:
        """Read the routes again if the manager has changed one since."""
        now = time.monotonic()
        self._look_again_at = now + ROUTES_OLD_S
        try:
            version = self._store.data_version()
            if version == self._data_version and self._generation >= 0:
                return
            view = self._manager = manager_view(self._store)
            self._data_version = version
            if view.generation != self._generation:
                self._routes = leases.routes(self._store)
                self._generation = view.generation
            self._unreadable.worked(now)
        except StateError as error:
            self._unreadable.failed(error, now)
            self._store.close()
            self._data_version = self._generation = -1

    def _paused(self) -> bool:
        return self._manager is not None and self._manager.paused_at is not None

    async def _until_resumed(self) -> None:
        """Wait for the end of a pause, however long. Raises ShuttingDown."""
        while self._paused():
            try:
                version = self._moves.version()
            except StateError:  # lost, or being made anew
                version = -1
            self._refresh()
            if self._manager is not None and self._manager.ending():
                raise ShuttingDown("the proxy is being stopped")
            await self._moves.after(version, within_s=LOOK_ANYWAY_S)

    def withdraw(self, asked: asyncio.Future[int]) -> None:
        """Withdraw the demand that was asked for, if it came to one."""
        if not asked.cancelled() and asked.exception() is None:
            demand_ids = [asked.result()]
            self.writer.in_the_end(
                lambda: demand_rows.withdraw(self._store, demand_ids), needed=lambda: True
            )

    async def _ask(self, model_id: str) -> int:
        """Insert the demand and wake the manager; a file that is not there yet is its to make."""
        demand_id = await self._insert_demand(model_id)
        self.held.keep_renewing()
        self.poke(b"load")
        return demand_id

    async def _insert_demand(self, model_id: str) -> int:
        give_up_at = time.monotonic() + MANAGER_PATIENCE_S
        while True:
            try:
                return await self.writer.write(
                    lambda: demand_rows.ask(
                        self._store,
                        "load",
                        model_id,
                        self._worker,
                        now=self._store.now(),
                        max_queue=self._live.settings.max_queue,
                    )
                )
            except StateError as error:
                self.writer.submit(self._store.close)
                if time.monotonic() > give_up_at + self._more_patience_s():
                    raise ManagerDown(f"the state file can't be used: {error}") from None
                await asyncio.sleep(0.05)

    async def _watch(
        self, model_id: str, demand_id: int, avoid_server_id: int | None, avoid_until: float
    ) -> bool:
        """Return when the model may be ready. Raises the manager's answer.

        False: the demand is gone, with the file that it stood in; ask again.
        """
        limit_s = self._live.settings.longest_wait_s(model_id)
        deadline = time.monotonic() + limit_s
        silent_since = None
        while True:
            now = time.monotonic()
            if now > deadline:
                raise LoadTimeout(f"model '{model_id}' was not ready after {limit_s:.0f} s")
            if now > avoid_until and avoid_server_id is not None:
                return True
            try:
                version = self._moves.version()
                self._refresh()
                if self._paused():
                    began = time.monotonic()
                    await self._until_resumed()
                    now = time.monotonic()
                    deadline += now - began
                    silent_since = None
                if self._ready_route(model_id, avoid_server_id):
                    return True
                self._raise_answer(demand_id)
                if not demand_rows.is_there(self._store, demand_id):
                    return False
                silent_since = self._check_manager(model_id, now, silent_since)
            except StateError as error:  # lost, damaged, or being made anew: wait on
                self._unreadable.failed(error, now)
                self._store.close()
                silent_since = self._check_silence(model_id, now, silent_since)
                await asyncio.sleep(LOOK_ANYWAY_S)
            else:
                await self._moves.after(version, within_s=LOOK_ANYWAY_S)

    def _raise_answer(self, demand_id: int) -> None:
        answer = demand_rows.read_answers(self._store, [demand_id]).get(demand_id)
        if answer and answer.error_code:
            raise from_code(answer.error_code, answer.message or "")

    def _more_patience_s(self) -> float:
        """Return how much longer a manager may give no sign that lives all the same."""
        return STUCK_PATIENCE_S if self.poke(b"load") else 0.0

    def _check_manager(self, model_id: str, now: float, silent_since: float | None) -> float | None:
        view = manager_view(self._store)
        if view.ending():
            raise ShuttingDown("the proxy is being stopped")
        if view.alive(self._store.now()):
            return None
        return self._check_silence(model_id, now, silent_since)

    def _check_silence(self, model_id: str, now: float, silent_since: float | None) -> float:
        """Return since when the manager gives no sign. Raises ManagerDown once that is too long."""
        if silent_since is None:
            return now
        silent_s = now - silent_since
        if silent_s > MANAGER_PATIENCE_S and silent_s > self._more_patience_s():
            raise ManagerDown(
                f"model '{model_id}' is not loaded and the manager does not answer;"
                " see its log, or start it with `smartproxy serve`"
            )
        return silent_since

    def poke(self, word: bytes) -> bool:
        """Wake the manager; a poke that can't be delivered is not needed. See doorbell.ring."""
        return doorbell.ring(self._live.settings.state_dir, word)


def _lease_on(route: Route) -> Lease:
    return Lease(
        server_id=route.server_id,
        host=route.host,
        port=route.port,
        api_key=route.api_key,
        model_id=route.model_id,
    )


__all__ = ["Broker", "SmartProxyError"]
