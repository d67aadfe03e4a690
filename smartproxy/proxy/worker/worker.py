"""gunicorn's worker for relaying: one event loop has all sockets, threads only run the application.

The loop (asyncio, main thread) accepts, collects requests, relays and keeps connections alive. A
collected request of the plainest form is decided on right here (`plain`); any other is parsed by
gunicorn and handled by the application (`application`) in a thread, or, where the path is known to
hand its requests over at once, in the loop. It stands on `gunicorn.workers.base.Worker` and nothing
of the other workers. No TLS and no HTTP/2: that is nginx's part.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from gunicorn.errors import ConfigError

from smartproxy.errors import SmartProxyError
from smartproxy.log import Outage
from smartproxy.proxy.relay import nginx, relay
from smartproxy.proxy.relay.relay import HandedOver, Request
from smartproxy.proxy.relay.socket_client import SocketClient
from smartproxy.proxy.wire.own_answers import error_answer
from smartproxy.proxy.wire.request_head import RequestHead
from smartproxy.proxy.worker.application import ApplicationWorker, Outcome
from smartproxy.proxy.worker.balance import Neighbours
from smartproxy.proxy.worker.inbox import Connection, Desk, Reception, path_in
from smartproxy.proxy.worker.plain import MAX_BODY_BYTES as MAX_PLAIN_BODY_BYTES
from smartproxy.proxy.worker.plain import (
    Application,
    incoming_head,
    incoming_of,
    plain_request,
)
from smartproxy.proxy.worker.uploads import LARGE_ROOM_BYTES, SMALL_ROOM_BYTES, Room

#: before the end of graceful_timeout (when the master kills) open streams get their final event
FAREWELL_S = 2.0
#: a stopping worker waits this long for a request that an idle client may just be sending
IDLE_FAREWELL_S = 1.0
TICK_S = 1.0
STOPPING_TICK_S = 0.05
#: how long a new connection is left to a worker that has fewer
NEIGHBOURS_TURN_S = 0.001
#: after a failed `accept`; the tick and a connection that ends try again sooner
ACCEPT_PAUSE_S = 0.1
#: requests up to this are handled in the loop where their path hands over; more would hold it up
MAX_INLINE_BYTES = 131072
#: answered in the loop too: in about a millisecond, and also when every thread waits for a load
QUICK_PATHS = frozenset({"/health"})
#: of an application that is none of ours
MAX_UNKNOWN_BODY_BYTES = 64 << 20
#: so many paths that hand over are remembered
MAX_INLINE_PATHS = 64


class RelayWorker(ApplicationWorker):
    """A worker whose open streams, waiting requests and slow clients hold no thread."""

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn before the start, where a worker has it."""
        cleartext = getattr(cfg, "http2_cleartext", "off")
        if cfg.is_ssl or cleartext != "off" or cfg.proxy_protocol not in (False, "off"):
            raise ConfigError(
                "RelayWorker speaks plain HTTP/1.1; let nginx do TLS, HTTP/2 and the PROXY protocol"
            )

    def init_process(self) -> None:
        self.check_config(self.cfg, self.log)
        self.nr_conns = 0
        self._accepting = False
        self._not_accepting = Outage(
            self.log.error_log,
            what="new connections can't be taken",
            over="new connections are taken again",
            after_s=0,
            calm_s=1,
        )
        self._threads = ThreadPoolExecutor(self.cfg.threads, thread_name_prefix="application")
        #: paths whose last request was handed over
        self._inline_paths: set[str] = set()
        #: waiting for a request, the one that waits longest first
        self._waiting: dict[Reception, None] = {}
        self._stopping_at: float | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._neighbours = Neighbours(self.age)
        self._relay = relay.run_here()
        self._loop = self._relay.loop
        self._desk = Desk(
            loop=self._loop,
            small_room=Room(SMALL_ROOM_BYTES),
            large_room=Room(LARGE_ROOM_BYTES),
            admit=self._admit,
            on_request=self._received,
            on_refused=self._refused,
            on_gone=self._gone,
            reader=self.reader,
        )
        super().init_process()

    def run(self) -> None:
        """Serve until told to stop and done with what was begun."""
        for listener in self.sockets:
            listener.setblocking(False)
        self._tick()
        self._loop.run_forever()
        self._threads.shutdown(wait=False)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.alive = False
        self._loop.call_soon_threadsafe(self._tick)

    def handle_quit(self, sig: int, frame: Any) -> None:
        self._threads.shutdown(wait=False)
        super().handle_quit(sig, frame)

    def _tick(self) -> None:
        """Every second (and when stopping, more often): heartbeat, accepting, expiry, stopping."""
        if self._ticker:
            self._ticker.cancel()
        self.notify()  # from the loop: one that hangs gets the worker replaced
        now = time.monotonic()
        if self.alive and self.ppid != os.getppid():
            self.log.info("The master is gone; shutting down: %s", self)
            self.alive = False
        if self.alive:
            self._neighbours.tell(self.nr_conns)
            self._accept_new(self.nr_conns < self.cfg.worker_connections)
        elif self._is_done(now):
            self._loop.stop()
            return
        self._close_expired(now)
        self._ticker = self._loop.call_later(TICK_S if self.alive else STOPPING_TICK_S, self._tick)

    def _is_done(self, now: float) -> bool:
        """Drive the stop: no new connections, time for the open ones, then their final events."""
        if self._stopping_at is None:
            self._stopping_at = now
            self._accept_new(False)
            self._neighbours.leave()
            for listener in self.sockets:  # else the kernel still takes what nobody will serve
                listener.close()
            for reception in self._waiting:
                reception.deadline = min(reception.deadline, now + IDLE_FAREWELL_S)
        stopping_s = now - self._stopping_at
        if stopping_s > self.cfg.graceful_timeout - FAREWELL_S:
            self._relay.stop_all()
        return bool(self.nr_conns == 0 or stopping_s > self.cfg.graceful_timeout)

    def _close_expired(self, now: float) -> None:
        expired = []
        for reception in self._waiting:
            if reception.deadline > now:
                break
            expired.append(reception)
        for reception in expired:
            if reception.lives_on(now):
                del self._waiting[reception]  # to the end: the order is that of the deadlines
                self._set_deadline(reception)

    def _accept_new(self, enabled: bool) -> None:
        if enabled is self._accepting:
            return
        self._accepting = enabled
        for listener in self.sockets:
            if enabled:
                self._loop.add_reader(listener.fileno(), self._offer, listener)
            else:
                self._loop.remove_reader(listener.fileno())

    def _offer(self, listener: Any) -> None:
        """Take a new connection, or leave it for a moment to a worker that has fewer."""
        if not self._neighbours.have_less(self.nr_conns):
            self._accept(listener)
            return
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(NEIGHBOURS_TURN_S, self._take_over, listener)

    def _take_over(self, listener: Any) -> None:
        if self._accepting:
            self._accept(listener)
        if self._accepting:
            self._loop.add_reader(listener.fileno(), self._offer, listener)

    def _accept(self, listener: Any) -> None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no files or no memory are left, here or in the whole system
            self._accept_failed(error)
            return
        self._not_accepting.worked(time.monotonic())
        self._count(1)
        sock.setblocking(False)
        conn = Connection(sock=sock, peer=peer, server=listener.getsockname())
        self._wait(Reception(self._desk, conn), b"")
        if self.nr_conns >= self.cfg.worker_connections:
            self._accept_new(False)

    def _accept_failed(self, error: OSError) -> None:
        """Take no connections for a moment. What waits in the kernel would wake us all the time."""
        self._not_accepting.failed(error, time.monotonic())
        self._accept_new(False)
        self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        if self.alive:
            self._accept_new(self.nr_conns < self.cfg.worker_connections)

    def _wait(self, reception: Reception, read_ahead: bytes) -> None:
        """Wait for a connection's next request."""
        self._set_deadline(reception)
        reception.wait(read_ahead)

    def _set_deadline(self, reception: Reception) -> None:
        keepalive_s = self.cfg.keepalive if self._stopping_at is None else IDLE_FAREWELL_S
        reception.deadline = time.monotonic() + keepalive_s
        self._waiting[reception] = None

    def _admit(self, conn: Connection, head: RequestHead) -> int:
        """Return how many bytes a request's body may have. Raises SmartProxyError."""
        if self._application is None:
            return MAX_UNKNOWN_BODY_BYTES
        incoming = incoming_head(head, behind_front=conn.sock.family == socket.AF_UNIX)
        return self._application.admit(incoming, head.length_bytes)

    def _refused(self, reception: Reception, status: int) -> None:
        """It was answered before its request was whole, and ends by itself."""
        self._waiting.pop(reception, None)
        if self._application:
            self._application.on_refused(status)

    def _gone(self, reception: Reception) -> None:
        self._waiting.pop(reception, None)
        reception.close()
        self._forget()

    def _count(self, change: int) -> None:
        self.nr_conns += change
        if self.alive:
            self._neighbours.tell(self.nr_conns)

    def _forget(self) -> None:
        """One connection less."""
        self._count(-1)
        if self.alive and not self._accepting:
            self._accept_new(True)

    def _received(self, reception: Reception) -> None:
        """A request is there."""
        self._waiting.pop(reception, None)
        body, head = reception.body, reception.head
        path = path_in(head)
        if self._plain and self._try_plain(self._plain, reception, body):
            return
        quick = path in self._inline_paths or path in QUICK_PATHS
        if quick and len(head) + len(body) <= MAX_INLINE_BYTES:
            self._handled(reception, path, self.handle(reception))
            return
        reception.channel.read(False)
        future = self._threads.submit(self.handle, reception)
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(
                self._handled_in_thread, reception, path, done
            )
        )

    def _try_plain(
        self, application: Application, reception: Reception, body: bytes | bytearray
    ) -> bool:
        """Relay or refuse a plain request without gunicorn's parser and Flask; false: not one."""
        if len(body) > MAX_PLAIN_BODY_BYTES:
            return False
        plain = plain_request(reception.head)
        if plain is None:
            return False
        family = reception.conn.sock.family
        behind_front = family == socket.AF_UNIX
        incoming = incoming_of(plain, body, application.paths, behind_front=behind_front)
        if incoming is None:
            return False
        reception.body = b""
        self.count_request()
        client = SocketClient(
            self._loop,
            reception.channel,
            keep_alive=plain.keep_alive and self.alive and bool(self.cfg.keepalive),
            on_done=partial(self._relayed, reception),
        )
        try:
            job = application.decide(incoming)
        except SmartProxyError as error:
            application.on_refused(error.http_status)
            reader = application.browsers.reader(incoming.field("Origin"), incoming.path)
            client.answer(error_answer(error, reader))
            return True
        delivery = nginx.delivery(
            data_plane=plain.field(b"x-smartproxy-data-plane"),
            retry=plain.field(b"x-smartproxy-retry"),
            family=family,
        )
        if reception.has_large_body:
            job.on_body_done = reception.forget_body
        self._relay.start_here(
            Request(job=job, broker=application.broker, client=client, delivery=delivery)
        )
        return True

    def _handled_in_thread(self, reception: Reception, path: str, done: Future[Outcome]) -> None:
        if error := done.exception():
            self.log.error("Error handling a connection", exc_info=error)
        self._handled(reception, path, Outcome() if error else done.result())

    def _handled(self, reception: Reception, path: str, outcome: Outcome) -> None:
        """Go on after the application: relay, send its answer, or close."""
        if outcome.handed_over:
            if len(self._inline_paths) < MAX_INLINE_PATHS:
                self._inline_paths.add(path)
            self._start_relay(reception, outcome, outcome.handed_over)
            return
        self._inline_paths.discard(path)
        if not outcome.data:
            self._gone(reception)
            return
        client = SocketClient(
            self._loop,
            reception.channel,
            keep_alive=outcome.keep_alive,
            on_done=partial(self._relayed, reception),
        )
        client.write(outcome.data)
        client.finish()

    def _start_relay(self, reception: Reception, outcome: Outcome, handed_over: HandedOver) -> None:
        client = SocketClient(
            self._loop,
            reception.channel,
            http11=outcome.req.version >= (1, 1),
            head_only=outcome.req.method == "HEAD",
            keep_alive=outcome.keep_alive,
            on_done=partial(self._relayed_outcome, reception, outcome),
        )
        self._relay.start_here(handed_over.for_client(client, reception.forget_body, direct=False))

    def _relayed_outcome(
        self, reception: Reception, outcome: Outcome, client: SocketClient
    ) -> None:
        outcome.reply.status = str(client.sent_status or 499)  # nginx's number for one that left
        outcome.reply.sent = client.sent_body_bytes
        self.log_access(outcome)
        self._relayed(reception, client)

    def _relayed(self, reception: Reception, client: SocketClient) -> None:
        if client.keep_alive:
            self._wait(reception, client.read_ahead)
        else:
            reception.forget_body()
            self._forget()
