"""A strict client: h11 reads the answer, and what it will not read is no answer.

A request goes out as bytes that a fault may choose; an answer comes back whole, or as one of the
words that say how it failed.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import h11

#: nobody waits longer than this; what takes longer is a request that hangs
DEADLINE_S = 90.0


class Failure(StrEnum):
    """How an answer failed to come."""

    REFUSED = "refused"  # no connection
    RESET = "reset"  # a connection, and then not a byte of an answer
    TORN = "torn"  # an answer that ended in the middle
    LATE = "late"  # no whole answer before the deadline: it hangs
    MALFORMED = "malformed"  # bytes that are not HTTP, not JSON, not events


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, or why there is none."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    failure: Failure | None = None
    detail: str = ""

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The proxy's own error code; "" where the answer is not an error of its own."""
        return self.header("x-smartproxy-error")


def request(
    path: str, body: dict[str, Any] | bytes | None = None, *, method: str = "", extra: str = ""
) -> bytes:
    """Return a request's bytes. extra: more header lines, each with its CRLF."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
    kind = "" if "content-type" in extra.lower() else "Content-Type: application/json\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}{length}{extra}\r\n"
    return head.encode() + data


def connect(port: int, timeout_s: float = 10.0) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(port: int, payload: bytes, *, deadline_s: float = DEADLINE_S) -> Answer:
    """Send one request on a connection of its own and read its answer strictly."""
    end = time.monotonic() + deadline_s
    try:
        sock = connect(port)
    except OSError as error:
        return Answer(failure=Failure.REFUSED, detail=str(error))
    with sock:
        try:
            sock.sendall(payload)
        except TimeoutError:
            return Answer(failure=Failure.LATE, detail="could not send the request")
        except OSError:
            pass  # an answer may have come before the request was through
        method = "HEAD" if payload.startswith(b"HEAD ") else "POST"
        return read_answer(sock, method=method, end=end)


def read_answer(sock: socket.socket, *, method: str = "POST", end: float | None = None) -> Answer:
    """Read one answer from a connection on which a request was sent. end: monotonic seconds."""
    end = time.monotonic() + DEADLINE_S if end is None else end
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    # h11 must know what was asked; the bytes have been sent already
    reader.send(h11.Request(method=method, target="/", headers=[("host", "127.0.0.1")]))
    reader.send(h11.EndOfMessage())
    head: h11.Response | None = None
    pieces: list[bytes] = []
    seen = False

    def failed(how: Failure, detail: str) -> Answer:
        status = head.status_code if head else 0
        return Answer(status=status, body=b"".join(pieces), failure=how, detail=detail)

    while True:
        try:
            event = reader.next_event()
        except h11.RemoteProtocolError as error:
            if not seen:
                return failed(Failure.RESET, "closed without a byte")
            how = Failure.TORN if reader.trailing_data[1] else Failure.MALFORMED
            return failed(how, str(error))
        if event is h11.NEED_DATA:
            sock.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = sock.recv(1 << 18)
            except TimeoutError:
                tail = b"".join(pieces)[-200:]
                return failed(Failure.LATE, f"no end of the answer; so far {head} {tail!r}")
            except OSError as error:
                return failed(Failure.TORN if seen else Failure.RESET, str(error))
            seen = seen or bool(data)
            reader.receive_data(data)
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            pieces.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = tuple((key.decode(), value.decode("latin-1")) for key, value in head.headers)
            return Answer(status=head.status_code, headers=headers, body=b"".join(pieces))
        elif isinstance(event, h11.ConnectionClosed):
            return failed(Failure.TORN if seen else Failure.RESET, "closed before an answer")


def events(body: bytes) -> list[Any]:
    """Return the payloads of a stream of events, `[DONE]` as it is. Raises ValueError."""
    if not body.endswith(b"\n\n"):
        raise ValueError(f"the stream ends inside an event: {body[-80:]!r}")
    found: list[Any] = []
    for line in body.decode().split("\n"):
        field, colon, value = line.partition(":")
        if (not colon and line) or field not in ("data", "event", "id", "retry", ""):
            raise ValueError(f"no line of an event: {line!r}")
        if field == "data":
            value = value.removeprefix(" ")
            found.append(value if value == "[DONE]" else json.loads(value))
    return found
