"""One request on one server: sends it, and passes the answer to the client as it comes.

Runs in the relay's loop; the client's speed bounds how fast the server is read. Retries are not
decided here, only whether the client has seen anything of this answer yet.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson

from smartproxy.errors import UpstreamError, UpstreamTimeout
from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.wire.bodies import Body, body_for
from smartproxy.proxy.wire.channel import Channel
from smartproxy.proxy.wire.heads import (
    MAX_HEAD_BYTES,
    AnswerHead,
    BadAnswer,
    Framing,
    parse_head,
    request_bytes,
)
from smartproxy.proxy.wire.own_answers import opened

#: up to this a body is joined to its head, which saves a system call; beyond, a copy
JOIN_BYTES = 65536
#: no socket can be made: this process, or the machine, is out of file descriptors or memory
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
OUT_OF_FILES_EVERY_S = 0.1
OUT_OF_FILES_S = 60.0


class ServerDied(Exception):
    """The server could not be reached, or its answer ended early or was not HTTP."""


class ClientStalled(Exception):
    """The client has taken nothing for as long as a server may say nothing."""


class Permit(Protocol):
    """One of a bounded number of requests. Both are called in the loop thread."""

    def take(self) -> None:
        """Begin. Raises RateLimitExceeded where none is left."""

    def give_back(self) -> None:
        """End; without having begun, nothing happens."""


@dataclass(slots=True, kw_only=True)
class Job:
    """One request to relay, its body complete. Only the body changes, by `forget_body`."""

    model_id: str
    method: str
    #: path and query as sent upstream
    target: str
    #: as received; what must not reach a server is left out later
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes | bytearray
    #: the body said `"stream": true`
    stream: bool
    #: without a byte from the server
    request_timeout_s: float
    #: until a waiting stream gets its first comment, and between comments
    sse_wait_comment_after_s: float
    #: told at the end the model and the status its client got; 0: it left before, None: nginx knows
    on_settled: Callable[[str, int | None], None] | None = None
    #: the origin whose pages may read the answer, `*`, or nothing for nobody
    reader: bytes = b""
    #: who asks must not see the paths of this machine
    discreet: bool = False
    #: told when nobody needs the body any more
    on_body_done: Callable[[], None] | None = None
    #: who asks may have only so many requests open
    permit: Permit | None = None

    def forget_body(self) -> None:
        """Let go of a body that can't be sent again: an answer has begun, and may take minutes."""
        self.body = b""
        if self.on_body_done:
            self.on_body_done()


class Exchange:
    """One use: `run`, then look at `answered` and `torn`."""

    def __init__(
        self, job: Job, client: Client, address: tuple[str, int], api_key: str | None
    ) -> None:
        self._job = job
        self._client = client
        self._address = address
        self._api_key = api_key
        #: the client was given something of this server's answer
        self.answered = False
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._channel: Channel | None = None
        self._head = b""
        self._body: Body | None = None
        self._sink: Callable[[bytes], None] = client.write
        #: an answer that a waiting event stream gets as one event
        self._collected: list[bytes] | None = None
        self._heard_at = self._loop.time()
        self._paused = False
        self._client_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def torn(self) -> bool:
        """Whether the client's body now ends inside a chunk."""
        return self._body is not None and self._body.torn

    async def run(self) -> None:
        """Relay until the client has the whole answer; the connection is closed in any case.

        Raises ServerDied, UpstreamError, UpstreamTimeout, ClientStalled.
        """
        try:
            self._start(await self._connected())
            await self._ended
        finally:
            if self._timer:
                self._timer.cancel()
            if self._channel:
                self._channel.close()

    def _start(self, sock: socket.socket) -> None:
        head = request_bytes(
            method=self._job.method,
            target=self._job.target,
            headers=self._job.headers,
            host=f"{self._address[0]}:{self._address[1]}",
            api_key=self._api_key,
            body=self._job.body,
        )
        self._channel = Channel(self._loop, sock, self._on_data, self._on_end)
        self._channel.read(True)
        if len(self._job.body) <= JOIN_BYTES:
            self._channel.write(head + self._job.body)
        else:
            self._channel.write(head)
            self._channel.write(self._job.body)
        self._client.on_room = self._resume
        self._timer = self._loop.call_later(self._job.request_timeout_s, self._check_progress)

    async def _connected(self) -> socket.socket:
        """Return what `_connect` does. Who has no descriptor left waits until others are done."""
        give_up_at = self._loop.time() + OUT_OF_FILES_S
        while True:
            try:
                return self._connect()
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    raise
                if self._loop.time() > give_up_at:
                    raise UpstreamError(
                        f"no connection to the server of model {self._job.model_id!r} could be "
                        f"opened for {OUT_OF_FILES_S:g} s: {error.strerror}; the proxy's limit of "
                        "open files (ulimit -n, LimitNOFILE) may be too low"
                    ) from error
            await asyncio.sleep(OUT_OF_FILES_EVERY_S)

    def _connect(self) -> socket.socket:
        """Return a socket, connected or about to be: on loopback the first write goes through."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(self._address)
        if error not in (0, errno.EINPROGRESS):
            sock.close()
            raise ServerDied(os.strerror(error))
        return sock

    def _on_data(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        body = self._body
        try:
            if body is None:
                taken = self._take_head(data)
                if taken is None:
                    return
                body, data = taken
            self._sink(body.feed(data))
        except BadAnswer as error:
            self._end(ServerDied(str(error)))
            return
        if body.done:
            self._complete()
        elif self._client.full:
            self._pause()

    def _take_head(self, data: bytes) -> tuple[Body, bytes] | None:
        """Return the body to feed and its first bytes, once the head is complete."""
        data = self._head + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > MAX_HEAD_BYTES:
                raise BadAnswer("endless head")
            self._head = data
            return None
        head = parse_head(data[:end], self._job.method)
        self._head = b""
        if head.status == 101:
            raise BadAnswer("switched protocols unasked")
        if head.status < 200:
            return self._take_head(data[end:])
        self._body = self._begin(head)
        return self._body, data[end:]

    def _begin(self, head: AnswerHead) -> Body:
        client = self._client
        if not client.began:
            client.begin(opened(head, self._job.reader))
            self._answer_begins()
            return body_for(head, client.framing)
        # The client waits with an event stream open: a stream goes on in it, all else becomes an
        # event.
        if head.status == 200 and head.is_event_stream:
            self._answer_begins()
            return body_for(head, client.framing)
        self._collected = []
        self._sink = self._collected.append
        return body_for(head, Framing.CLOSE)

    def _answer_begins(self) -> None:
        self.answered = True
        self._job.forget_body()

    def _complete(self) -> None:
        if self._collected is None:
            self._client.finish()
        else:
            self._client.write_event(as_event(b"".join(self._collected)))
            self._client.finish_events()
        self._end(None)

    def _on_end(self, error: OSError | None) -> None:
        if error or self._body is None:
            self._end(ServerDied(str(error) if error else "closed without an answer"))
            return
        try:
            self._sink(self._body.end_of_connection())
        except BadAnswer as bad:
            self._end(ServerDied(str(bad)))
        else:
            self._complete()

    def _end(self, error: Exception | None) -> None:
        if self._channel:
            self._channel.close()
        if self._ended.done():
            return
        if error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    def _pause(self) -> None:
        assert self._channel
        self._paused = True
        self._client_bytes = self._client.progress_bytes()
        self._channel.read(False)

    def _resume(self) -> None:
        if self._paused and self._channel:
            self._paused = False
            self._heard_at = self._loop.time()
            self._channel.read(True)

    def _check_progress(self) -> None:
        timeout_s = self._job.request_timeout_s
        now = self._loop.time()
        if self._paused and self._client.progress_bytes() != self._client_bytes:
            self._client_bytes = self._client.progress_bytes()
            self._heard_at = now
        left_s = self._heard_at + timeout_s - now
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_progress)
        elif self._paused:
            self._end(ClientStalled(f"the client took nothing for {timeout_s:g} s"))
        else:
            self._end(
                UpstreamTimeout(
                    f"the server of model {self._job.model_id!r} sent nothing for {timeout_s:g} s; "
                    "request_timeout is the setting"
                )
            )


def as_event(body: bytes) -> bytes:
    """Return an answer's body as one event of an event stream."""
    try:
        text = orjson.dumps(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = body.decode("utf-8", "replace")
        text = orjson.dumps({"error": {"message": message, "type": "server_error"}})
    return b"data: " + text + b"\n\n"
