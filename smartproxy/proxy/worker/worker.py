"""gunicorn's worker for relaying: one event loop has all sockets, threads only run the application.

The loop (asyncio, main thread) accepts, collects requests, relays and keeps connections alive. A
collected request of the plainest form is decided on right here (`plain`); any other is parsed and
handled by gunicorn's own code (`handling`) in a thread, or, where the path is known to hand its
requests over at once, in the loop. gunicorn's poller and queues stay unused. No TLS and no HTTP/2:
that is nginx's part.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import Any

from gunicorn.errors import ConfigError
from gunicorn.http import get_parser
from gunicorn.workers.gthread import TConn

from smartproxy.errors import SmartProxyError
from smartproxy.proxy.own_answers import error_answer, origin_of
from smartproxy.proxy.relay import nginx, relay
from smartproxy.proxy.relay.relay import Request
from smartproxy.proxy.relay.socket_client import SocketClient
from smartproxy.proxy.wire.channel import HIGH_WATER_BYTES, close_gently
from smartproxy.proxy.worker.application import HandlingWorker, RelayTicket
from smartproxy.proxy.worker.balance import Neighbours
from smartproxy.proxy.worker.inbox import Collected, Outbox, Reception
from smartproxy.proxy.worker.plain import MAX_BODY_BYTES as MAX_PLAIN_BODY_BYTES
from smartproxy.proxy.worker.plain import Application, incoming_of, plain_request

#: before the end of graceful_timeout (when the master kills) open streams get their final event
FAREWELL_S = 2.0
#: a stopping worker waits this long for a request that an idle client may just be sending
IDLE_FAREWELL_S = 2.0
TICK_S = 1.0
STOPPING_TICK_S = 0.05
#: how long a new connection is left to a worker that has fewer
NEIGHBOURS_TURN_S = 0.001
#: requests up to this are handled in the loop where their path hands over; more would hold it up
MAX_INLINE_BYTES = 131072
#: answered in the loop too: in about a millisecond, and also when every thread waits for a load
QUICK_PATHS = frozenset({"/health"})


class RelayWorker(HandlingWorker):
    """ThreadWorker whose open streams, waiting requests and slow clients hold no thread."""

    _accepting: bool

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        if cfg.is_ssl or cfg.http2_cleartext != "off":
            raise ConfigError("RelayWorker speaks plain HTTP/1.1; let nginx do TLS and HTTP/2")

    def init_process(self) -> None:
        self._collected = Collected()
        #: waiting for a request, the one that waits longest first
        self._waiting: dict[Reception, None] = {}
        self._stopping_at: float | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._neighbours = Neighbours(self.age)
        self._relay = relay.run_here()
        self._loop = self._relay.loop
        super().init_process()

    # --- the worker's life ------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop and done with what was begun."""
        for listener in self.sockets:
            listener.setblocking(False)
        self._tick()
        self._loop.run_forever()
        self.tpool.shutdown(wait=False)
        self.poller.close()
        self.method_queue.close()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.alive = False
        self._loop.call_soon_threadsafe(self._tick)

    def _tick(self) -> None:
        """Every second (and when stopping, more often): heartbeat, accepting, expiry, stopping."""
        if self._ticker:
            self._ticker.cancel()
        self.notify()  # from the loop: one that hangs gets the worker replaced
        now = time.monotonic()
        if self.alive and not self.is_parent_alive():
            self.alive = False
        if self.alive:
            self._neighbours.tell(self.nr_conns)
            self.set_accept_enabled(self.nr_conns < self.worker_connections)
        elif self._is_done(now):
            self._loop.stop()
            return
        self._close_expired(now)
        self._ticker = self._loop.call_later(TICK_S if self.alive else STOPPING_TICK_S, self._tick)

    def _is_done(self, now: float) -> bool:
        """Drive the stop: no new connections, time for the open ones, then their final events."""
        if self._stopping_at is None:
            self._stopping_at = now
            self.set_accept_enabled(False)
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
            self._gone(reception)

    def set_accept_enabled(self, enabled: bool) -> None:
        if enabled is self._accepting:
            return
        self._accepting = enabled
        for listener in self.sockets:
            if enabled:
                self._loop.add_reader(listener.fileno(), self._offer, listener)
            else:
                self._loop.remove_reader(listener.fileno())

    # --- a connection -----------------------------------------------------------------------

    def _offer(self, listener: Any) -> None:
        """Take a new connection, or leave it for a moment to a worker that has fewer."""
        if not self._neighbours.have_less(self.nr_conns):
            self.accept(listener)
            return
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(NEIGHBOURS_TURN_S, self._take_over, listener)

    def _take_over(self, listener: Any) -> None:
        if self._accepting:
            self.accept(listener)
        if self._accepting:
            self._loop.add_reader(listener.fileno(), self._offer, listener)

    def accept(self, listener: Any) -> None:
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self._count(1)
        conn = TConn(self.cfg, sock, client, listener.getsockname())
        conn.initialized = conn.data_ready = True
        conn.parser = get_parser(self.cfg, sock, client)
        self._wait(Reception(self._loop, conn, self._collected, self._received, self._gone), b"")
        if self.nr_conns >= self.worker_connections:
            self.set_accept_enabled(False)

    def _wait(self, reception: Reception, read_ahead: bytes) -> None:
        """Wait for a connection's next request."""
        keepalive_s = self.cfg.keepalive if self._stopping_at is None else IDLE_FAREWELL_S
        reception.deadline = time.monotonic() + keepalive_s
        self._waiting[reception] = None
        reception.conn.parser.mesg = None  # done with: gunicorn would look for the rest of its body
        reception.wait(read_ahead)

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
            self.set_accept_enabled(True)

    def _received(self, reception: Reception) -> None:
        """A request is there (or a head whose body must be read from the socket)."""
        self._waiting.pop(reception, None)
        body, head = reception.body, reception.head
        if body is not None:
            if self._plain and self._try_plain(self._plain, reception, body):
                return
            if len(head) + len(body) <= MAX_INLINE_BYTES:
                target = head.split(b" ", 2)[1:2]
                path = target[0].partition(b"?")[0].decode("latin-1") if target else ""
                if path in self._inline_paths or path in QUICK_PATHS:
                    self._handle_here(reception)
                    return
        reception.channel.read(False)
        future = self.tpool.submit(self._handle_in_thread, reception)
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._handled_in_thread, reception, done)
        )

    def _try_plain(self, application: Application, reception: Reception, body: bytes) -> bool:
        """Relay or refuse a plain request without gunicorn's parser and Flask; false: not one."""
        if len(body) > MAX_PLAIN_BODY_BYTES:
            return False
        plain = plain_request(reception.head)
        incoming = incoming_of(plain, body, application.paths) if plain else None
        if plain is None or incoming is None:
            return False
        reception.body = None
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
            client.answer(error_answer(error, origin_of(incoming.headers)))
            return True
        way = nginx.way(
            data_plane=plain.field(b"x-smartproxy-data-plane"),
            retry=plain.field(b"x-smartproxy-retry"),
            family=reception.conn.sock.family,
        )
        self._relay.start_here(Request(job=job, broker=application.broker, client=client, way=way))
        return True

    def _handle_here(self, reception: Reception) -> None:
        conn = reception.conn
        conn.parser.unreader.unread(reception.head)
        sock, conn.sock = conn.sock, Outbox(conn.sock.family)
        try:
            outcome = self.handle_collected(reception)
        finally:
            outbox, conn.sock = conn.sock, sock
        if outbox.data:
            reception.channel.write(outbox.data)
        self._handled(reception, outcome)

    def _handle_in_thread(self, reception: Reception) -> Any:
        reception.conn.parser.unreader.unread(reception.head)
        outcome = self.handle_collected(reception)
        reception.conn.sock.setblocking(False)
        return outcome

    def _handled_in_thread(self, reception: Reception, done: Future[Any]) -> None:
        self._handled(reception, None if done.exception() else done.result())

    def _handled(self, reception: Reception, outcome: Any) -> None:
        """Go on after gunicorn's `handle`: relay, wait for the next request, or close."""
        channel = reception.channel
        if isinstance(outcome, RelayTicket):
            self._start_relay(reception, outcome)
        elif channel.buffered_bytes > HIGH_WATER_BYTES:  # it asks and asks and does not read
            self._gone(reception)
        elif outcome:
            self._wait(reception, reception.conn.parser.unreader.take_buffered())
        elif channel.buffered_bytes:
            self._gone(reception)
        else:
            close_gently(self._loop, channel.detach())
            self._forget()

    # --- relaying ---------------------------------------------------------------------------

    def _start_relay(self, reception: Reception, ticket: RelayTicket) -> None:
        assert ticket.job
        client = SocketClient(
            self._loop,
            reception.channel,
            http11=ticket.req.version >= (1, 1),
            head_only=ticket.req.method == "HEAD",
            keep_alive=ticket.keep_alive,
            on_done=partial(self._relayed_ticket, reception, ticket),
        )
        self._relay.start_here(
            Request(job=ticket.job, broker=ticket.broker, client=client, way=ticket.way)
        )

    def _relayed_ticket(
        self, reception: Reception, ticket: RelayTicket, client: SocketClient
    ) -> None:
        if self.log.access_log_enabled:
            response = ticket.response
            response.status = str(client.sent_status or 499)  # nginx's number for one that left
            response.sent = client.sent_body_bytes
            took = datetime.now() - ticket.started_at  # noqa: DTZ005
            self.log.access(response, ticket.req, ticket.environ, took)
        self._relayed(reception, client)

    def _relayed(self, reception: Reception, client: SocketClient) -> None:
        if client.keep_alive:
            unread = reception.conn.parser.unreader.take_buffered()
            self._wait(reception, unread + client.read_ahead)
        else:
            self._forget()
