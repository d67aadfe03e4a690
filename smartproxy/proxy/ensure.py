"""Get a request a ready server, or the reason why not. Runs in the worker's relay loop.

From memory while the model is loaded: routes are read again only when the manager changed one, and
a lease is written only when a server goes from idle to busy. Otherwise: one demand row, a poke, and
waiting until the state file says ready or why not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

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
from smartproxy.proxy.file_watch import Moves
from smartproxy.proxy.outage import Outage
from smartproxy.proxy.relay.relay import Lease
from smartproxy.state import demands as demand_rows
from smartproxy.state import leases
from smartproxy.state.leases import Route
from smartproxy.state.manager_row import ManagerView, manager_view
from smartproxy.state.store import Store

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: a waiting request looks at its deadlines this often, whether the file moves or not
LOOK_ANYWAY_S = 0.25
#: routes may be this old: a server that is leaving waits for its leases, and no lease is written
#: on one that is no longer ready, so that this is only a matter of asking less often
ROUTES_OLD_S = 0.01
#: how long an idle server's lease is kept before it is given back: sequential requests of one
#: client then cost no writes, and an eviction waits at most this long for it
LINGER_S = 0.05
#: how soon it is tried again to give back a lease or a demand
WRITE_AGAIN_S = 0.5
#: a killed manager is back within a second or two, on a crowded machine within twenty: who waits is
#: not sent away before
MANAGER_PATIENCE_S = 30.0
#: one that lives and gives no sign waits for a locked file, or for a full disk; `serve` ends one
#: that hangs
STUCK_PATIENCE_S = 75.0
#: a request to a ready server waits so long for its lease to be written, and goes on without
LEASE_PATIENCE_S = 0.5
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
        self._moves = Moves(store)
        #: the manager's row as last read; None: not read yet
        self._manager: ManagerView | None = None
        self._routes: dict[str, Route] = {}
        self._generation = -1
        self._data_version = -1
        self._look_again_at = 0.0
        self._in_flight: Counter[int] = Counter()
        #: servers with a lease of ours in the file; a task while it is being written
        self._leases: dict[int, asyncio.Task[bool]] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._renewing: asyncio.Task[None] | None = None
        self._unreadable = Outage(
            logger,
            what="the state file can't be read",
            over="the state file can be read again",
            after_s=FILE_PATIENCE_S,
        )
        # told at once: leases that are not renewed expire
        self._not_renewed = Outage(
            logger, what="leases are not renewed", over="leases are renewed again", after_s=0
        )

        self._not_leased = Outage(
            logger, what="leases can't be written", over="leases are written again", after_s=0
        )
        self._not_given_back = Outage(
            logger, what="leases can't be given back", over="leases are given back", after_s=0
        )
        #: what is still to be written, so that it is not collected before
        self._unwritten: set[asyncio.Task[None]] = set()

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
                elif await self._take(route.server_id):
                    return _lease_on(route)
                else:
                    self._generation = -1  # it is no longer ready: read the routes again
        finally:
            # not before the lease is written: a server that nobody seems to want may be evicted
            if asked is not None:
                asked.add_done_callback(self.withdraw)

    def release(self, lease: Lease) -> None:
        """Give a hold back."""
        server_id = lease.server_id
        self._in_flight[server_id] -= 1
        if self._in_flight[server_id] == 0:
            used_at = self._store.now()
            asyncio.get_running_loop().call_later(LINGER_S, self._give_back, server_id, used_at)

    async def _take(self, server_id: int) -> bool:
        """Count a request on a server, writing the lease if there is none yet."""
        self._in_flight[server_id] += 1
        writing = self._leases.get(server_id)
        if writing is None:
            writing = asyncio.create_task(self._write_lease(server_id))
            self._leases[server_id] = writing
            self.keep_renewing()
        taken = False
        try:
            async with asyncio.timeout(LEASE_PATIENCE_S):
                taken = await asyncio.shield(writing)
        except TimeoutError:
            # as where it can't be written; it is given back once it is, or forgotten
            taken = True
            writing.add_done_callback(lambda _: self._forget(server_id, writing))
        finally:
            if not taken:
                self._in_flight[server_id] -= 1
                # a lease that was written is given back, also when its client goes right then:
                # forgotten here it would stay in the file, renewed for ever (F1)
                self._forget(server_id, writing)
                if self._in_flight[server_id] == 0:
                    self._give_back(server_id, self._store.now())
        return taken

    def _forget(self, server_id: int, writing: asyncio.Task[bool]) -> None:
        """Have the next request on a server write a lease, where this one came to nothing."""
        if _came_to_nothing(writing) and self._leases.get(server_id) is writing:
            del self._leases[server_id]

    async def _write_lease(self, server_id: int) -> bool:
        """Return whether the server can be used: it is ready, or the file can't say otherwise."""
        try:
            taken = await self.write(
                lambda: leases.take_lease(
                    self._store, self._worker, server_id, now=self._store.now()
                )
            )
        except StateError as error:
            # a server that is ready answers without a lease; before its end its slots are asked too
            self._not_leased.failed(error, time.monotonic())
            return True
        self._not_leased.worked(time.monotonic())
        return taken

    def _give_back(self, server_id: int, used_at: float) -> None:
        writing = self._leases.get(server_id)
        if self._in_flight[server_id] or writing is None:
            return
        if not writing.done():  # asked and gone before the lease was even written
            writing.add_done_callback(lambda _: self._give_back(server_id, used_at))
            return
        del self._leases[server_id]
        del self._in_flight[server_id]
        # the writer is one thread: a new lease on this server can only be written after this
        self._write_in_the_end(
            lambda: leases.release_lease(
                self._store, self._worker, server_id, last_used_at=used_at
            ),
            needed=lambda: server_id not in self._leases,
        )

    def keep_renewing(self) -> None:
        """Have this worker's leases and demands renewed from now on."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Renew leases and demands while there are any."""
        while True:
            await asyncio.sleep(leases.RENEW_S)
            try:
                await self.write(
                    lambda: leases.renew(self._store, self._worker, now=self._store.now())
                )
                self._not_renewed.worked(time.monotonic())
            except StateError as error:
                self._not_renewed.failed(error, time.monotonic())

    async def write(self, work: Callable[[], T]) -> T:
        """Run a write in the one thread that writes."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _write_in_the_end(self, work: Callable[[], None], needed: Callable[[], bool]) -> None:
        """Have something written, again and again while that fails and is needed. Never blocks.

        A row that stays would be renewed for ever, and its server, or another model, would wait.
        """
        first = asyncio.wrap_future(self._writer.submit(work))
        task = asyncio.create_task(self._until_written(first, work, needed))
        self._unwritten.add(task)
        task.add_done_callback(self._unwritten.discard)

    async def _until_written(
        self,
        written: asyncio.Future[None],
        work: Callable[[], None],
        needed: Callable[[], bool],
    ) -> None:
        while True:
            try:
                await written
            except StateError as error:
                self._not_given_back.failed(error, time.monotonic())
            else:
                self._not_given_back.worked(time.monotonic())
                return
            await asyncio.sleep(WRITE_AGAIN_S)
            if not needed():
                return
            written = asyncio.wrap_future(self._writer.submit(work))

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
            self._write_in_the_end(
                lambda: demand_rows.withdraw(self._store, demand_ids), needed=lambda: True
            )

    async def _ask(self, model_id: str) -> int:
        """Insert the demand and wake the manager; a file that is not there yet is its to make."""
        demand_id = await self._insert_demand(model_id)
        self.keep_renewing()
        self.poke(b"load")
        return demand_id

    async def _insert_demand(self, model_id: str) -> int:
        give_up_at = time.monotonic() + MANAGER_PATIENCE_S
        while True:
            try:
                return await self.write(
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
                self._writer.submit(self._store.close)
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
        """Wake the manager; a poke that can't be delivered is not needed. See send_poke."""
        return send_poke(self._live.settings.state_dir, word)


def _came_to_nothing(writing: asyncio.Task[bool]) -> bool:
    """Return whether a lease was asked for and there is none now."""
    if not writing.done():
        return False
    return writing.cancelled() or writing.exception() is not None or not writing.result()


def _lease_on(route: Route) -> Lease:
    return Lease(
        server_id=route.server_id,
        host=route.host,
        port=route.port,
        api_key=route.api_key,
        model_id=route.model_id,
    )


def send_poke(state_dir: Path, word: bytes) -> bool:
    """Send a word to the manager's socket, by its folder's descriptor: a path may be too long.

    Returns whether a manager is there to read it.
    """
    try:
        folder = os.open(state_dir, os.O_PATH)
    except OSError:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(word, f"/proc/self/fd/{folder}/manager.sock")
    except BlockingIOError:
        return True  # it has not read those before yet
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


__all__ = ["Broker", "SmartProxyError", "send_poke"]
