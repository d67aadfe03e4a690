"""What answers on the listening socket while `serve` stops: `shutting_down`, to everybody, at once.

The workers have closed theirs. Without this a client would still get a connection, in a queue that
nobody serves, and wait there until all is over.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass

from smartproxy.errors import ShuttingDown, openai_body

#: for a client to send the head of its request
HEAD_PATIENCE_S = 2.0
#: for a client to read the answer: closed with bytes unread, it might not get it
LINGER_S = 1.0
LOOK_EVERY_S = 0.1
MAX_HEAD_BYTES = 65536
#: more at once are closed unanswered
MAX_CLIENTS = 1000


def answer(head: bytes) -> bytes:
    """Return the whole answer to a request, by its head."""
    error = ShuttingDown("the proxy is being stopped")
    body = json.dumps(openai_body(error)).encode()
    lines = [
        f"HTTP/1.1 {error.http_status} Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {error.retry_after_s}",
        f"X-Smartproxy-Error: {error.code}",
        "Connection: close",
    ]
    text = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return text if head.startswith(b"HEAD ") else text + body


@dataclass(slots=True)
class _Client:
    deadline: float
    head: bytes = b""
    answered: bool = False


class Farewell:
    """A thread that answers, from its making until `end`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        #: only the thread uses these two
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, _Client] = {}
        self._ended = threading.Event()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="farewell", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop; a client that was answered already has what it needs."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(LOOK_EVERY_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)
            now = time.monotonic()
            for sock in [s for s, client in self._clients.items() if client.deadline < now]:
                self._late(sock)
        for sock in list(self._clients):
            self._close(sock)
        self._selector.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # a worker was faster; or no descriptor is left for it
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock] = _Client(time.monotonic() + HEAD_PATIENCE_S)
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, sock: socket.socket) -> None:
        client = self._clients[sock]
        try:
            data = sock.recv(MAX_HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(sock)
        elif not client.answered:
            client.head += data
            if b"\r\n\r\n" in client.head or len(client.head) > MAX_HEAD_BYTES:
                self._answer(sock, client)

    def _late(self, sock: socket.socket) -> None:
        client = self._clients[sock]
        if client.answered:
            self._close(sock)
        else:
            self._answer(sock, client)

    def _answer(self, sock: socket.socket, client: _Client) -> None:
        client.answered = True
        client.deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            sock.send(answer(client.head))
            sock.shutdown(socket.SHUT_WR)

    def _close(self, sock: socket.socket) -> None:
        del self._clients[sock]
        self._selector.unregister(sock)
        sock.close()
