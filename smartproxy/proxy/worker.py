"""gunicorn's threaded worker; the client socket of a relayed request moves to the relay's loop.

A thread parses a request and runs the application; if that hands the request over
(`relay.hand_over`), nothing is written here, and the thread is free. When the answer is complete
the connection comes back to gunicorn's own poller for the next request. Stands on internals of
gunicorn 27's `gthread`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from smartproxy.proxy import accel
from smartproxy.proxy.relay import TICKET_KEY, Broker, Job, Request, relay_loop
from smartproxy.proxy.socket_client import SocketClient

#: before the end of graceful_timeout (when the master kills) open streams get their final event
FAREWELL_S = 2.0

#: what `finish_request` is given for a connection that can take its next request
_KEEP: Future[bool] = Future()
_KEEP.set_result(True)


class HandedOver(Exception):
    """Control flow: leaves gunicorn's response handling without anything written."""


class RelayTicket:
    """One request on one connection, from the application's call to the connection's return."""

    def __init__(self, req: Any, conn: Any) -> None:
        self.req = req
        self.conn = conn
        self.started_at = datetime.now().astimezone()
        self.job: Job | None = None
        #: set with the job, before the relay sees the ticket
        self.environ: dict[str, Any]
        #: gunicorn's Response: what it decided about this connection, and what its log reads
        self.response: Any
        self.keep_alive = False

    def take(self, job: Job, broker: Broker, avoid_server_id: int | None) -> None:
        """Called by the application, in its thread."""
        self.job = job
        self.broker = broker
        self.avoid_server_id = avoid_server_id


class RelayWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """ThreadWorker whose open streams and waiting requests hold no thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._local = threading.local()
        self._farewell_at: float | None = None

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.wsgi  # type: ignore[has-type]
        self.wsgi = partial(self._call_application, application)

    def notify(self) -> None:
        """Show the master a sign of life only while the relay's loop has one too."""
        if not self.cfg.timeout or relay_loop().silent_s() < self.cfg.timeout:
            super().notify()

    # --- a request's way out: worker threads ------------------------------------------------------

    def handle_request(self, req: Any, conn: Any) -> Any:
        self._local.ticket = ticket = RelayTicket(req, conn)
        try:
            return super().handle_request(req, conn)
        except HandedOver:
            return ticket
        finally:
            del self._local.ticket

    def _call_application(
        self, application: Any, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        ticket: RelayTicket | None = getattr(self._local, "ticket", None)
        if ticket is None or self.cfg.is_ssl:  # HTTP/2 and TLS: the response goes through gunicorn
            return application(environ, start_response)  # type: ignore[no-any-return]
        environ[TICKET_KEY] = ticket
        body = application(environ, start_response)
        if ticket.job is None:
            return body  # type: ignore[no-any-return]
        if hasattr(body, "close"):
            body.close()
        ticket.environ = environ
        ticket.response = start_response.__self__  # type: ignore[attr-defined]
        ticket.keep_alive = not (ticket.response.must_close or ticket.req.should_close())
        raise HandedOver

    def _keepalive_after(self, conn: Any, outcome: Any) -> Any:
        if not isinstance(outcome, RelayTicket):
            return super()._keepalive_after(conn, outcome)
        # An upload that was not read to its end makes the connection useless for a next request.
        outcome.keep_alive = outcome.keep_alive and super()._keepalive_after(conn, True)
        conn.sock.setblocking(False)
        relay = relay_loop()
        relay.loop.call_soon_threadsafe(self._relay, outcome)
        return outcome

    # --- the loop thread --------------------------------------------------------------------------

    def _relay(self, ticket: RelayTicket) -> None:
        assert ticket.job
        relay = relay_loop()
        client = SocketClient(
            relay.loop,
            ticket.conn.sock,
            http11=ticket.req.version >= (1, 1),
            head_only=ticket.req.method == "HEAD",
            keep_alive=ticket.keep_alive,
            on_done=partial(self._relayed, ticket),
        )
        request = Request(
            job=ticket.job,
            broker=ticket.broker,
            client=client,
            avoid_server_id=ticket.avoid_server_id,
            nginx_carries=accel.nginx_carries(ticket.environ),
        )
        relay.start_here(request)

    def _relayed(self, ticket: RelayTicket, client: SocketClient) -> None:
        if self.log.access_log_enabled:
            response = ticket.response
            response.status = str(
                client.sent_status or 499
            )  # nginx's number for a client that left
            response.sent = client.sent_body_bytes
            took = datetime.now().astimezone() - ticket.started_at
            self.log.access(response, ticket.req, ticket.environ, took)
        self.method_queue.defer(self._take_back, ticket.conn, client.keep_alive, client.read_ahead)

    # --- back in gunicorn's own loop: main thread ------------------------------------------------

    def _take_back(self, conn: Any, keep_alive: bool, read_ahead: bytes) -> None:
        if not keep_alive:  # the relay has closed it
            self.nr_conns -= 1
            return
        if read_ahead:
            unreader = conn.parser.unreader
            unreader.unread(unreader.take_buffered() + read_ahead)
        super().finish_request(conn, _KEEP)

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        if not fs.cancelled() and fs.exception() is None and isinstance(fs.result(), RelayTicket):
            return  # the relay has it
        if fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
            return
        # gunicorn would wait here, in its only loop, up to 2 s for the client to close too
        self.nr_conns -= 1
        relay_loop().close_gently(conn.sock)

    def enqueue_req(self, conn: Any) -> None:
        """Give a connection to a thread once it has something to read.

        gunicorn lets a fresh connection hold a thread for up to 5 s until its first byte: a few
        idle ones would stop everything, /health too.
        """
        if conn.initialized or conn.data_ready:
            super().enqueue_req(conn)
            return
        conn.sock.setblocking(False)
        conn.set_timeout()
        self.pending_conns.append(conn)
        callback = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, EVENT_READ, callback)

    def _cap_keepalive(self, deadline: float) -> None:
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:  # else a silent connection holds up the stop
            conn.timeout = min(conn.timeout, deadline)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        if not self.alive:
            for listener in self.sockets:  # else the kernel still takes connections nobody serves
                listener.close()
            timeout = min(timeout, self._farewell())
        super().wait_for_and_dispatch_events(timeout)

    def _farewell(self) -> float:
        """End open streams once their time to finish by themselves is over; return s until then."""
        now = time.monotonic()
        if self._farewell_at is None:
            self._farewell_at = now + max(self.cfg.graceful_timeout - FAREWELL_S, 0)
        left_s = self._farewell_at - now
        if left_s > 0:
            return left_s
        relay_loop().stop_all()
        return 0.2
