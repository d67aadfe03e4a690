"""One request in gunicorn's code and the application, up to its answer or its being handed over.

Stands on gunicorn 27's `gthread` (handle, handle_request, _keepalive_after). The sockets are
`worker`'s part.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any

from gunicorn.http.body import LengthReader
from gunicorn.http.errors import InvalidHeader
from gunicorn.workers.gthread import ThreadWorker

from smartproxy.proxy.relay.nginx import Way
from smartproxy.proxy.relay.relay import TICKET_KEY, Broker, Job
from smartproxy.proxy.worker.inbox import Outbox, Reception
from smartproxy.proxy.worker.plain import Application

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
        self.way: Way
        #: set with the job
        self.environ: dict[str, Any]
        #: gunicorn's Response: what it decided about this connection, and what its log reads
        self.response: Any
        self.keep_alive = False

    def take(self, job: Job, broker: Broker, way: Way) -> None:
        """Called by the application."""
        self.job = job
        self.broker = broker
        self.way = way


class HandlingWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """ThreadWorker whose `handle` may return a RelayTicket: the relay answers this request."""

    def init_process(self) -> None:
        self._local = threading.local()
        #: paths whose last request was handed over
        self._inline_paths: set[str] = set()
        self._plain: Application | None = None
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.wsgi  # type: ignore[has-type]
        self.wsgi = partial(self._call_application, application)
        # an access log or a count of requests needs gunicorn's own objects
        if not (self.log.access_log_enabled or self.cfg.max_requests):
            self._plain = application if isinstance(application, Application) else None

    def handle_collected(self, reception: Reception) -> Any:
        """Run gunicorn's `handle` on a connection's request; in a thread or in the loop."""
        self._local.reception = reception
        return self.handle(reception.conn)

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


def _give_body(req: Any, body: bytes) -> None:
    """Let the application read a collected body without gunicorn's copying it piece by piece.

    Raises gunicorn's InvalidHeader where its parser sees another length than we did.
    """
    reader = req.body.reader
    if not isinstance(reader, LengthReader) or reader.length != len(body):
        raise InvalidHeader("CONTENT-LENGTH", req=req)
    req.body = io.BytesIO(body)
