"""One request in gunicorn's parser and the WSGI application, up to its answer or its hand-over.

Of gunicorn it uses what all its workers do: `RequestParser` over an iterable, and `wsgi.create` for
the environment. A collected request never touches the client's socket, so it can be handled in the
loop too. The sockets are `worker`'s part.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gunicorn.http import errors, wsgi
from gunicorn.http.parser import RequestParser
from gunicorn.workers.base import Worker

from smartproxy.errors import BadRequest, SmartProxyError
from smartproxy.proxy.inference import BODY_KEY
from smartproxy.proxy.relay.relay import HandedOver
from smartproxy.proxy.wire.heads import (
    FIELD_VALUE,
    TOKEN,
    AnswerHead,
    Framing,
    client_head,
    header_bytes,
)
from smartproxy.proxy.wire.own_answers import error_answer
from smartproxy.proxy.worker.inbox import Connection, Reception, origin_in, path_in
from smartproxy.proxy.worker.plain import Application

#: of refusals that are no 400
STATUS = {
    errors.ForbiddenProxyRequest: 403,
    errors.LimitRequestLine: 414,
    errors.ExpectationFailed: 417,
    errors.LimitRequestHeaders: 431,
    errors.UnsupportedTransferCoding: 501,
}


@dataclass(slots=True, kw_only=True)
class Reply:
    """What the application answers, complete before any of it is sent."""

    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    #: body bytes, for the access log
    sent: int = 0

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self.status, self.headers = status, headers
        return self.pieces.append

    def bytes_for(self, method: str, keep_alive: bool) -> bytes:
        """Return head and body. Raises ValueError for a header that would break its line."""
        code, _, reason = self.status.partition(" ")
        body = b"".join(self.pieces)
        headers = [
            pair
            for pair in header_bytes(self.headers)
            if method == "HEAD" or pair[0].lower() != b"content-length"
        ]
        for name, value in headers:
            if not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
                raise ValueError(f"not a header: {name!r}")
        bodyless = method == "HEAD" or code in ("204", "304")
        if not bodyless:
            headers.append((b"Content-Length", b"%d" % len(body)))
        framing = Framing.NONE if bodyless else Framing.LENGTH
        head = AnswerHead(
            status=int(code),
            reason=reason.encode("latin-1"),
            headers=tuple(headers),
            framing=framing,
            length_bytes=None if bodyless else len(body),
        )
        self.sent = 0 if bodyless else len(body)
        return client_head(head, framing, keep_alive) + (b"" if bodyless else body)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a request: an answer to send, or a job for the relay."""

    keep_alive: bool = False
    #: head and body of an answer
    data: bytes = b""
    handed_over: HandedOver | None = None
    #: what the relay and the access log need of the request
    req: Any = None
    environ: dict[str, Any] = field(default_factory=dict)
    reply: Reply = field(default_factory=Reply)
    started_at: datetime = field(default_factory=datetime.now)


class ApplicationWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """A worker that runs one request in the application; how requests come is a subclass's part."""

    alive: bool
    nr: int

    def init_process(self) -> None:
        self._application: Application | None = None
        #: the same, where requests may go its short way
        self._plain: Application | None = None
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.wsgi
        self._application = application if isinstance(application, Application) else None
        if not self.log.access_log_enabled:
            self._plain = self._application  # an access log needs gunicorn's own objects

    def handle(self, reception: Reception) -> Outcome:
        """Return what came of a connection's request; in a thread, or in the loop if collected."""
        conn, body = reception.conn, reception.body
        reception.body = b""
        req = None
        try:
            req = next(RequestParser(self.cfg, [reception.head], conn.peer))
            _give_body(req, body)
            outcome = self._run(req, conn, body)
        except (errors.ParseException, errors.NoMoreData) as error:
            self.log.warning("Invalid request from %s: %s", conn.peer, error)
            status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
            refusal = BadRequest(f"not a request that can be answered: {error}")
            return self._refusal(reception, refusal, status)
        except Exception as error:  # an application's fault ends its request alone
            self.log.exception("Error handling request %s", req and req.uri)
            return self._refusal(reception, SmartProxyError(type(error).__name__), 500)
        if outcome.handed_over is None:
            outcome.data = outcome.reply.bytes_for(req.method, outcome.keep_alive)
            self.log_access(outcome)
        return outcome

    def count_request(self) -> None:
        """Count one; with the last of max_requests the worker takes no more."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False

    def _run(self, req: Any, conn: Connection, body: bytes | bytearray) -> Outcome:
        """Call the application."""
        self.cfg.pre_request(self, req)
        started_at = datetime.now()  # noqa: DTZ005  # only its difference is used
        response, environ = wsgi.create(req, conn.sock, conn.peer, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        environ[BODY_KEY] = body
        self.count_request()
        keep_alive = self.alive and bool(self.cfg.keepalive) and not req.should_close()
        outcome = Outcome(keep_alive=keep_alive, req=req, environ=environ, started_at=started_at)
        answer: Iterable[bytes] = self.wsgi(environ, outcome.reply.start_response)
        if isinstance(answer, HandedOver):
            outcome.handed_over = answer
        else:
            _collect(answer, outcome.reply)
        self.cfg.post_request(self, req, environ, response)
        # the outcome lives as long as its answer: a large body must not
        environ[BODY_KEY], environ["wsgi.input"], req.body = b"", None, None
        return outcome

    def reader(self, head: bytes | bytearray) -> bytes:
        """Return the origin whose pages may read the answer to a head that nobody could parse."""
        origin = origin_in(head)
        if not origin or self._application is None:
            return b""
        return self._application.browsers.reader(origin.decode("latin-1"), path_in(head))

    def _refusal(self, reception: Reception, error: SmartProxyError, status: int) -> Outcome:
        """Answer what the application never saw, or failed at; the connection ends with it."""
        answer = error_answer(error, self.reader(reception.head), status=status)
        head = client_head(answer.head, Framing.LENGTH, keep_alive=False)
        return Outcome(data=head + answer.body)

    def log_access(self, outcome: Outcome) -> None:
        """Write the access log's line."""
        if self.log.access_log_enabled:
            took = datetime.now() - outcome.started_at  # noqa: DTZ005
            self.log.access(outcome.reply, outcome.req, outcome.environ, took)


class BodyStream(io.RawIOBase):
    """A body to read from; it is not copied before."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._left = memoryview(body)

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        size = min(len(room), len(self._left))
        room[:size], self._left = self._left[:size], self._left[size:]
        return size


def _give_body(req: Any, body: bytes | bytearray) -> None:
    """Let the application read a collected body without gunicorn's copying it piece by piece.

    Raises gunicorn's InvalidHeader where its parser sees another length than we did.
    """
    lengths = [value for name, value in req.headers if name == "CONTENT-LENGTH"]
    if int(lengths[0] if lengths else 0) != len(body):
        raise errors.InvalidHeader("CONTENT-LENGTH", req=req)
    req.body = io.BufferedReader(BodyStream(body))


def _collect(answer: Iterable[bytes], reply: Reply) -> None:
    try:
        reply.pieces.extend(answer)
    finally:
        if hasattr(answer, "close"):
            answer.close()
