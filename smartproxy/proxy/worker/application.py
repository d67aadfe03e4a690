"""One request in gunicorn's parser and the WSGI application, up to its answer or its hand-over.

Of gunicorn it uses what all its workers do: `RequestParser` over an iterable, and `wsgi.create` for
the environment. A collected request never touches the client's socket, so it can be handled in the
loop too. The sockets are `worker`'s part.
"""

from __future__ import annotations

import io
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gunicorn.http import errors, wsgi
from gunicorn.http.parser import RequestParser
from gunicorn.workers.base import Worker

from smartproxy.errors import BadRequest, SmartProxyError
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

#: for a client to go on with what it is sending, while a thread waits
STALL_S = 60.0
READ_BYTES = 65536
#: of refusals that are no 400
STATUS = {
    errors.ForbiddenProxyRequest: 403,
    errors.LimitRequestLine: 414,
    errors.ExpectationFailed: 417,
    errors.LimitRequestHeaders: 431,
    errors.UnsupportedTransferCoding: 501,
}


class Source:
    """What gunicorn's parser reads a request from: what is there, then the socket, if given."""

    def __init__(self, data: bytes, sock: socket.socket | None) -> None:
        self._pieces = deque([data])
        self._sock = sock
        #: somebody wanted to read beyond what there is
        self.ran_dry = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._pieces:
            return self._pieces.popleft()
        data = self._sock.recv(READ_BYTES) if self._sock else b""
        if not data:
            self.ran_dry = True
            raise StopIteration
        return data

    def stop(self) -> None:
        """Read nothing more from the socket."""
        self._sock = None


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
    #: what came of the next request already
    left_over: bytes = b""
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
        self._plain: Application | None = None
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application = self.wsgi
        if isinstance(application, Application) and not self.log.access_log_enabled:
            self._plain = application  # an access log needs gunicorn's own objects

    def handle(self, reception: Reception) -> Outcome:
        """Return what came of a connection's request; in a thread, or in the loop if collected."""
        conn, body = reception.conn, reception.body
        reception.body = None
        source = Source(reception.head, conn.sock if body is None else None)
        req = None
        try:
            parser = RequestParser(self.cfg, source, conn.peer)
            req = next(parser)
            if body is not None:
                _give_body(req, body)
            outcome = self._run(req, conn)
        except errors.NoMoreData as error:
            self.log.debug("Ignored premature client disconnection. %s", error)
            return Outcome()
        except errors.ParseException as error:
            self.log.warning("Invalid request from %s: %s", conn.peer, error)
            status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
            refusal = BadRequest(f"not a request that can be answered: {error}")
            return self._refusal(reception, refusal, status)
        except OSError as error:
            self.log.debug("Ignored a broken connection. %s", error)
            return Outcome()
        except Exception as error:  # an application's fault ends its request alone
            self.log.exception("Error handling request %s", req and req.uri)
            return self._refusal(reception, SmartProxyError(type(error).__name__), 500)
        if body is None:
            outcome.left_over, whole = _rest(req, parser, source)
            outcome.keep_alive = outcome.keep_alive and whole
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

    def _run(self, req: Any, conn: Connection) -> Outcome:
        """Call the application."""
        self.cfg.pre_request(self, req)
        started_at = datetime.now()  # noqa: DTZ005  # only its difference is used
        response, environ = wsgi.create(req, conn.sock, conn.peer, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        self.count_request()
        keep_alive = self.alive and bool(self.cfg.keepalive) and not req.should_close()
        outcome = Outcome(keep_alive=keep_alive, req=req, environ=environ, started_at=started_at)
        answer: Iterable[bytes] = self.wsgi(environ, outcome.reply.start_response)
        if isinstance(answer, HandedOver):
            outcome.handed_over = answer
        else:
            _collect(answer, outcome.reply)
        self.cfg.post_request(self, req, environ, response)
        return outcome

    def reader(self, head: bytes | bytearray) -> bytes:
        """Return the origin whose pages may read the answer to a head that nobody could parse."""
        origin, application = origin_in(head), self.wsgi
        if not origin or not isinstance(application, Application):
            return b""
        return application.browsers.reader(origin.decode("latin-1"), path_in(head))

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


def _give_body(req: Any, body: bytes) -> None:
    """Let the application read a collected body without gunicorn's copying it piece by piece.

    Raises gunicorn's InvalidHeader where its parser sees another length than we did.
    """
    lengths = [value for name, value in req.headers if name == "CONTENT-LENGTH"]
    if int(lengths[0] if lengths else 0) != len(body):
        raise errors.InvalidHeader("CONTENT-LENGTH", req=req)
    req.body = io.BytesIO(body)


def _collect(answer: Iterable[bytes], reply: Reply) -> None:
    try:
        reply.pieces.extend(answer)
    finally:
        if hasattr(answer, "close"):
            answer.close()


def _rest(req: Any, parser: Any, source: Source) -> tuple[bytes, bool]:
    """Return what was read of the next request, and whether this one's body was read to its end.

    The rest of an upload that nobody wanted is not waited for.
    """
    source.stop()
    with suppress(errors.ParseException, OSError):
        while req.body.read(READ_BYTES):
            pass
    whole = not source.ran_dry
    return b"".join(iter(parser.unreader.read, b"")), whole
