"""Servers for the relay to talk to that do exactly what a test says, byte for byte.

A script is a function that gets the connection after the request was read; it sends what it likes
and returns, whereupon the connection is closed. So anything can be acted, broken HTTP too.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

DEADLINE_S = 60.0


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Return once the condition holds; fail with `what` if it does not within the deadline."""
    give_up_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


def event_head(extra: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n" + extra + b"\r\n"
    )


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def plain_answer(body: bytes, status: bytes = b"200 OK", extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status,
        len(body),
        extra,
        body,
    )


@dataclass
class Visit:
    """One connection that a server got."""

    sock: socket.socket
    head: bytes = b""
    body: bytes = b""
    #: the relay has closed its side
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def request_line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        pairs = (line.partition(b":") for line in self.head.split(b"\r\n")[1:] if line)
        return {name.lower(): value.strip() for name, _, value in pairs}

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_gone(self) -> None:
        """Return when the relay has closed the connection."""
        self.sock.settimeout(DEADLINE_S)
        with suppress(ConnectionError):
            while self.sock.recv(65536):
                pass
        self.gone.set()

    def reset(self) -> None:
        """Close with a TCP reset instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script = Callable[[Visit], None]


class Upstream:
    """Plays its scripts, one a connection, the last one again and again."""

    def __init__(self, *scripts: Script, read_body: bool = True) -> None:
        self.visits: list[Visit] = []
        self._scripts = list(scripts)
        self._read_body = read_body
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for visit in self.visits:
            with suppress(OSError):
                visit.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for visit in self.visits:
            visit.sock.close()

    def visit(self, number: int = 0) -> Visit:
        """Return a connection, waiting for it if need be."""
        wait_until(lambda: len(self.visits) > number, f"connection {number} to the upstream")
        return self.visits[number]

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            self._start(self._play, Visit(sock), script)

    def _play(self, visit: Visit, script: Script) -> None:
        with suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                piece = visit.sock.recv(65536)
                if not piece:
                    visit.sock.close()
                    return
                data += piece
            head, _, rest = data.partition(b"\r\n\r\n")
            visit.head = head
            pieces, left = [rest], int(visit.headers.get(b"content-length", b"0")) - len(rest)
            while self._read_body and left > 0:
                pieces.append(visit.sock.recv(1 << 20))
                left -= len(pieces[-1])
            visit.body = b"".join(pieces)
            self.visits.append(visit)
            script(visit)
            visit.sock.close()
