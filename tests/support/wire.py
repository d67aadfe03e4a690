"""A strict HTTP/1.1 client on a bare socket: what it returns was framed correctly to the byte."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 20.0
#: what the tests call a proxy by on a bare socket
HOSTS = ("p", "q", "x", "proxy")
#: a page's origin that the tests' proxies allow
PAGE = "https://page.example"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    #: sizes of the chunks, in order; None where the body was not chunked
    chunks: list[int] | None = None

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) < 2, f"{name} is there {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection. `rest` are bytes that came behind the last answer."""

    def __init__(self, address: tuple[str, int] | str, timeout_s: float = TIMEOUT_S) -> None:
        if isinstance(address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            self.sock.connect(address)
        else:
            self.sock = socket.create_connection(address, timeout=timeout_s)
        self.rest = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> Wire:
        self.sock.sendall(data)
        return self

    def post(self, target: str, body: bytes | dict[str, Any], extra: str = "") -> Wire:
        return self.send(request(target, body, extra))

    def read_answer(self, head_only: bool = False) -> Answer:
        status, headers = self.read_head()
        if head_only or status in (204, 304):
            return Answer(status, headers, b"")
        lowered = [(name.lower(), value) for name, value in headers]
        lengths = [value for name, value in lowered if name == "content-length"]
        codings = [value for name, value in lowered if name == "transfer-encoding"]
        assert len(lengths) + len(codings) <= 1, f"two framings: {headers}"
        if codings:
            assert codings == ["chunked"]
            return self._read_chunked(status, headers)
        if lengths:
            return Answer(status, headers, self.read_exactly(int(lengths[0])))
        assert ("connection", "close") in lowered, f"nothing says where the body ends: {headers}"
        return Answer(status, headers, self.read_to_end())

    def read_head(self) -> tuple[int, list[tuple[str, str]]]:
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _reason = lines[0].split(" ", 2)
        assert version == "HTTP/1.1", lines[0]
        headers = []
        for line in lines[1:-2]:
            name, colon, value = line.partition(": ")
            assert colon, line
            assert name == name.strip(), line
            headers.append((name, value))
        return int(status), headers

    def read_chunk(self) -> bytes:
        """Return the payload of one chunk; empty at the last one, whose end is read too."""
        size = int(self.read_until(b"\r\n")[:-2], 16)
        payload = self.read_exactly(size)
        assert self.read_exactly(2) == b"\r\n"
        return payload

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            self._more(f"waiting for {mark!r}")
        end = self.rest.index(mark) + len(mark)
        data, self.rest = self.rest[:end], self.rest[end:]
        return data

    def read_exactly(self, size: int) -> bytes:
        pieces = [self.rest]
        left = size - len(self.rest)
        while left > 0:
            piece = self.sock.recv(1 << 20)
            assert piece, f"closed with {left} bytes missing"
            pieces.append(piece)
            left -= len(piece)
        data = b"".join(pieces)
        self.rest = data[size:]
        return data[:size]

    def read_to_end(self) -> bytes:
        pieces = [self.rest]
        self.rest = b""
        while piece := self.sock.recv(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)

    def is_closed(self) -> bool:
        """Block until the other side closes (true) or sends something (false)."""
        try:
            return self.rest == b"" and self.sock.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True

    def _read_chunked(self, status: int, headers: list[tuple[str, str]]) -> Answer:
        payloads = []
        while payload := self.read_chunk():
            payloads.append(payload)
        return Answer(status, headers, b"".join(payloads), [len(p) for p in payloads])

    def _more(self, why: str) -> None:
        piece = self.sock.recv(65536)
        assert piece, f"closed while {why}; had {self.rest[:200]!r}"
        self.rest += piece


def request(target: str, body: bytes | dict[str, Any], extra: str = "") -> bytes:
    """Return a POST request as bytes; extra: header lines, each with its line end."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {target} HTTP/1.1\r\nHost: proxy\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
    return head.encode("latin-1") + data
