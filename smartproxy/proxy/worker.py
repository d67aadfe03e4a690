"""gunicorn's worker for relaying: one event loop has all sockets, threads only run the application.

The loop (asyncio, main thread) accepts, collects requests, relays and keeps connections alive. A
collected request is parsed and handled by gunicorn's own code in a thread, or, where the path is
known to hand its requests over at once, right in the loop. Stands on gunicorn 27's `gthread`
(handle, handle_request, TConn); its poller and queues stay unused. No TLS and no HTTP/2: that is
nginx's part.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import Any

from gunicorn.errors import ConfigError
from gunicorn.http import get_parser
from gunicorn.http.body import LengthReader
from gunicorn.http.errors import InvalidHeader
from gunicorn.workers.gthread import TConn, ThreadWorker

from smartproxy.proxy import accel, relay
from smartproxy.proxy.channel import HIGH_WATER_BYTES, close_gently
from smartproxy.proxy.reception import Collected, Outbox, Reception
from smartproxy.proxy.relay import TICKET_KEY, Broker, Job, Request
from smartproxy.proxy.socket_client import SocketClient

#: before the end of graceful_timeout (when the master kills) open streams get their final event
FAREWELL_S = 2.0
#: a stopping worker waits this long for a request that an idle client may just be sending
IDLE_FAREWELL_S = 2.0
TICK_S = 1.0
STOPPING_TICK_S = 0.05
#: requests up to this are handled in the loop where their path hands over; more would hold it up
MAX_INLINE_BYTES = 131072
MAX_INLINE_PATHS = 64
#: for a client to go on with what it is sending, or to read what it is sent, while a thread waits
STALL_S = 60.0


class HandedOver(Exception):
    """Control flow: leaves gunicorn's response handling without anything written."""


class RelayTicket:
    """One request on one connection, from the application's call to the connection's return."""

    def __init__(self, req: Any) -> None:
        self.req = req
        self.started_at = datetime.now()  # noqa: DTZ005  # only its difference is used
        self.job: Job | None = None
        self.broker: Broker
        self.avoid_server_id: int | None = None
        #: set with the job
        self.environ: dict[str, Any]
        #: gunicorn's Response: what it decided about this connection, and what its log reads
        self.response: Any
        self.keep_alive = False

    def take(self, job: Job, broker: Broker, avoid_server_id: int | None) -> None:
        """Called by the application."""
        self.job = job
        self.broker = broker
        self.avoid_server_id = avoid_server_id


class RelayWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """ThreadWorker whose open streams, waiting requests and slow clients hold no thread."""

    _accepting: bool

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        if cfg.is_ssl or cfg.http2_cleartext != "off":
            raise ConfigError("RelayWorker speaks plain HTTP/1.1; let nginx do TLS and HTTP/2")

    def init_process(self) -> None:
        self._local = threading.local()
        self._collected = Collected()
        #: waiting for a request, the one that waits longest first
        self._waiting: dict[Reception, None] = {}
        #: paths whose last request was handed over
        self._inline_paths: set[str] = set()
        self._stopping_at: float | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._relay = relay.run_here()
        self._loop = self._relay.loop
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.wsgi  # type: ignore[has-type]
        self.wsgi = partial(self._call_application, application)

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
                self._loop.add_reader(listener.fileno(), self.accept, listener)
            else:
                self._loop.remove_reader(listener.fileno())

    # --- a connection -----------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
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

    def _forget(self) -> None:
        """One connection less."""
        self.nr_conns -= 1
        if self.alive and not self._accepting:
            self.set_accept_enabled(True)

    def _received(self, reception: Reception) -> None:
        """A request is there (or a head whose body must be read from the socket)."""
        self._waiting.pop(reception, None)
        reception.conn.parser.unreader.unread(reception.head)
        body, head = reception.body, reception.head
        if body is not None and len(head) + len(body) <= MAX_INLINE_BYTES:
            target = head.split(b" ", 2)[1:2]
            if target and target[0].partition(b"?")[0].decode("latin-1") in self._inline_paths:
                self._handle_here(reception)
                return
        reception.channel.read(False)
        future = self.tpool.submit(self._handle_in_thread, reception)
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._handled_in_thread, reception, done)
        )

    def _handle_here(self, reception: Reception) -> None:
        conn = reception.conn
        sock, conn.sock = conn.sock, Outbox(conn.sock.family)
        try:
            self._local.reception = reception
            outcome = self.handle(conn)
        finally:
            outbox, conn.sock = conn.sock, sock
        if outbox.data:
            reception.channel.write(outbox.data)
        self._handled(reception, outcome)

    def _handle_in_thread(self, reception: Reception) -> Any:
        self._local.reception = reception
        outcome = self.handle(reception.conn)
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

    # --- a request, in a thread or in the loop ----------------------------------------------

    def handle_request(self, req: Any, conn: Any) -> Any:
        reception: Reception = self._local.reception
        if reception.body is not None:
            _give_body(req, reception.body)
            reception.body = None
        if not isinstance(conn.sock, Outbox):
            conn.sock.settimeout(STALL_S)
        self._local.ticket = ticket = RelayTicket(req)
        try:
            return super().handle_request(req, conn)
        except HandedOver:
            return ticket

    def _call_application(
        self,
        application: Callable[..., Iterable[bytes]],
        environ: dict[str, Any],
        start_response: Callable[..., Any],
    ) -> Iterable[bytes]:
        ticket: RelayTicket = self._local.ticket
        environ[TICKET_KEY] = ticket
        body = application(environ, start_response)
        if ticket.job is None:
            self._inline_paths.discard(ticket.req.path)
            return body
        if hasattr(body, "close"):
            body.close()
        if len(self._inline_paths) < MAX_INLINE_PATHS:
            self._inline_paths.add(ticket.req.path)
        ticket.environ = environ
        ticket.response = start_response.__self__  # type: ignore[attr-defined]
        ticket.keep_alive = not (ticket.response.must_close or ticket.req.should_close())
        raise HandedOver

    def _keepalive_after(self, conn: Any, outcome: Any) -> Any:
        """Whether the connection can be reused: not with an upload in it that nobody read."""
        if isinstance(conn.parser.mesg.body, io.BytesIO):
            return outcome
        if not isinstance(outcome, RelayTicket):
            return super()._keepalive_after(conn, outcome)
        outcome.keep_alive = outcome.keep_alive and super()._keepalive_after(conn, True)
        return outcome

    # --- relaying ---------------------------------------------------------------------------

    def _start_relay(self, reception: Reception, ticket: RelayTicket) -> None:
        assert ticket.job
        client = SocketClient(
            self._loop,
            reception.channel,
            http11=ticket.req.version >= (1, 1),
            head_only=ticket.req.method == "HEAD",
            keep_alive=ticket.keep_alive,
            on_done=partial(self._relayed, reception, ticket),
        )
        self._relay.start_here(
            Request(
                job=ticket.job,
                broker=ticket.broker,
                client=client,
                avoid_server_id=ticket.avoid_server_id,
                nginx_carries=accel.nginx_carries(ticket.environ),
            )
        )

    def _relayed(self, reception: Reception, ticket: RelayTicket, client: SocketClient) -> None:
        if self.log.access_log_enabled:
            response = ticket.response
            response.status = str(client.sent_status or 499)  # nginx's number for one that left
            response.sent = client.sent_body_bytes
            took = datetime.now() - ticket.started_at  # noqa: DTZ005
            self.log.access(response, ticket.req, ticket.environ, took)
        if client.keep_alive:
            unread = reception.conn.parser.unreader.take_buffered()
            self._wait(reception, unread + client.read_ahead)
        else:
            self._forget()


def _give_body(req: Any, body: bytes) -> None:
    """Let the application read a collected body without gunicorn's copying it piece by piece.

    Raises gunicorn's InvalidHeader where its parser sees another length than we did.
    """
    reader = req.body.reader
    if not isinstance(reader, LengthReader) or reader.length != len(body):
        raise InvalidHeader("CONTENT-LENGTH", req=req)
    req.body = io.BytesIO(body)
