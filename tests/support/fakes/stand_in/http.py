"""HTTP/1.1 as llama-server speaks it, over one socket per thread. Handwritten for a fast start.

Kept from the real one: header set and error shape, keep-alive of 5 s, errors close the connection,
a streamed answer is chunked and then closes it without saying so.
"""

from __future__ import annotations

import json
import select
import socket
from dataclasses import dataclass

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}
REASONS |= {429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented"}
REASONS |= {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_TYPES |= {404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}
JSON = "application/json; charset=utf-8"


class Gone(Exception):
    """The client has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    #: with the query
    target: str
    #: names in lower case
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


class Connection:
    """One client; the methods raise Gone when it has left."""

    def __init__(self, sock: socket.socket, keepalive_s: float) -> None:
        self._sock = sock
        self._buffer = b""
        self._keepalive_s = keepalive_s
        self._origin = ""
        self._head_only = False
        #: no further request will be read
        self.closing = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_request(self) -> Request:
        """Wait for the next request; raises Gone also after keepalive_s without one."""
        try:
            self._sock.settimeout(self._keepalive_s)
            head = self._read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            method, target, version = head[0].split(" ", 2)
            pairs = (line.partition(":") for line in head[1:] if line)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            self._origin = headers.get("origin", "")
            self._head_only = method == "HEAD"
            wants_close = headers.get("connection", "").lower() == "close"
            self.closing = wants_close or version == "HTTP/1.0"
            self._sock.settimeout(None)
            if headers.get("expect", "").lower() == "100-continue":
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = self._read_body(headers)
        except (OSError, ValueError) as error:
            raise Gone from error
        return Request(method=method, target=target, headers=headers, body=body)

    def answer_json(self, status: int, value: object) -> None:
        self.answer(status, JSON, dump(value))

    def answer(self, status: int, content_type: str, body: bytes, extra: str = "") -> None:
        """Send a whole answer with its length."""
        self.closing = self.closing or status >= 400
        head = self._head(status, content_type, extra) + f"Content-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + (b"" if self._head_only else body))

    def start_stream(self) -> None:
        extra = "X-Accel-Buffering: no\r\n"
        head = self._head(200, "text/event-stream", extra) + "Transfer-Encoding: chunked\r\n\r\n"
        self.send(head.encode())

    def send_chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.closing = True
        self.send(b"0\r\n\r\n")

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise Gone from error

    def gone(self) -> bool:
        """Say whether the client has closed its side; does not block."""
        try:
            readable, _, _ = select.select([self._sock], [], [], 0)
            return bool(readable) and self._sock.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        self._sock.close()

    def _head(self, status: int, content_type: str, extra: str) -> str:
        keep = "Connection: close" if self.closing else "Keep-Alive: timeout=5, max=100"
        credentials = "Access-Control-Allow-Credentials: true\r\n" if self._origin else ""
        return (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n{keep}\r\n{extra}"
            f"Server: llama.cpp\r\nContent-Type: {content_type}\r\n"
            f"Access-Control-Allow-Origin: {self._origin}\r\n{credentials}"
        )

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            parts = []
            while size := int(self._read_until(b"\r\n").split(b";")[0], 16):
                parts.append(self._read_exactly(size))
                self._read_until(b"\r\n")
            while self._read_until(b"\r\n"):
                pass
            return b"".join(parts)
        return self._read_exactly(int(headers.get("content-length", "0")))

    def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._receive()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _read_exactly(self, size: int) -> bytes:
        parts, missing = [self._buffer[:size]], size - len(self._buffer)
        self._buffer = self._buffer[size:]
        while missing > 0:
            data = self._sock.recv(min(missing, 1 << 20))
            if not data:
                raise Gone
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _receive(self) -> None:
        data = self._sock.recv(1 << 16)
        if not data:
            raise Gone
        self._buffer += data


def dump(value: object) -> bytes:
    """Return JSON without blanks, as llama-server writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def error_body(status: int, message: str, **more: object) -> dict[str, object]:
    """Return llama-server's error object."""
    kind = str(more.pop("type", _TYPES.get(status, "server_error")))
    return {"error": {"code": status, "message": message, "type": kind, **more}}
