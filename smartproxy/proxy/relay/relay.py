"""Relaying: waiting for a model, sending the request, passing the answer on; any number at once.

All of it happens in one asyncio loop per process, so an open stream or a waiting request holds no
thread. `RelayResponse` is the way in from a view of Flask's. docs/datapath.md has the picture
and the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import uvloop
from flask import Response

from smartproxy.errors import ShuttingDown, SmartProxyError, UpstreamError, discreet
from smartproxy.proxy.relay import nginx
from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.relay.nginx import Delivery
from smartproxy.proxy.relay.running import Running
from smartproxy.proxy.relay.upstream import ClientStalled, Exchange, Job, ServerDied
from smartproxy.proxy.relay.wsgi_client import WsgiClient
from smartproxy.proxy.wire.own_answers import event_stream_head

__all__ = [
    "Broker",
    "HandedOver",
    "Job",
    "Lease",
    "RelayLoop",
    "RelayResponse",
    "Request",
    "relay_loop",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One request's hold on a server, until it is released."""

    server_id: int
    host: str
    port: int
    api_key: str | None
    model_id: str


class Broker(Protocol):
    """Who knows the servers. Both are called in the loop thread."""

    async def acquire(self, model_id: str, *, avoid_server_id: int | None = None) -> Lease:
        """Return a hold on a ready server, however long that takes. Raises SmartProxyError.

        Cancelled when the client goes; a cancelled acquire must leave nothing held.
        avoid_server_id: this one could not be reached or died just now.
        """

    def release(self, lease: Lease) -> None:
        """Give the hold back; never blocks."""


class HandedOver:
    """The answer of a WSGI application to a request that is the relay's.

    A RelayWorker starts `for_client`. Any other server iterates it, which blocks until the answer's
    head is there and then yields its body.
    """

    def __init__(
        self,
        job: Job,
        broker: Broker,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
    ) -> None:
        self.job = job
        self.broker = broker
        self.delivery = nginx.delivery_of(environ)
        self._start_response = start_response
        self._client: WsgiClient | None = None

    def __iter__(self) -> Iterator[bytes]:
        loop = relay_loop()
        self._client = client = WsgiClient(loop.loop)
        loop.start(self.for_client(client, direct=True))
        self._start_response(*client.head.result())
        return client

    def for_client(
        self, client: Client, on_body_done: Callable[[], None] | None = None, *, direct: bool
    ) -> Running:
        """Return what answers the client. direct: nginx can't be sent to the server instead."""
        self.job.on_body_done = on_body_done
        delivery = self.delivery
        if direct:
            delivery = Delivery(failed_server_id=delivery.failed_server_id)
        return Request(job=self.job, broker=self.broker, client=client, delivery=delivery)

    def close(self) -> None:
        """Called by the WSGI server when it is done, or its client is gone."""
        if self._client:
            self._client.close()


class RelayResponse(Response):
    """What a view of Flask's returns to let the relay answer."""

    def __init__(self, job: Job, broker: Broker) -> None:
        super().__init__()
        self._job = job
        self._broker = broker

    def __call__(self, environ: Any, start_response: Any) -> HandedOver:
        return HandedOver(self._job, self._broker, environ, start_response)


class Request(Running):
    """One job with its client, from start to its last byte."""

    def __init__(
        self, *, job: Job, broker: Broker, client: Client, delivery: Delivery = nginx.DIRECT
    ) -> None:
        """delivery: with a server that nginx could not reach, the one retry is already used."""
        super().__init__(client, job.reader)
        self.job = job
        self.broker = broker
        self.delivery = delivery
        self._exchange: Exchange | None = None
        self._left_to_nginx = False

    def __str__(self) -> str:
        return f"relaying to {self.job.model_id!r}"

    async def _run(self) -> None:
        if self.job.permit:
            self.job.permit.take()
            # nginx would not tell us when the request ends
            self.delivery = Delivery(failed_server_id=self.delivery.failed_server_id)
        avoid_server_id = self.delivery.failed_server_id
        attempts = 2 if avoid_server_id is None else 1
        for attempts_left in reversed(range(attempts)):
            lease = await self._acquire(avoid_server_id)
            if self.delivery.nginx_carries and not self.client.began:
                self._redirect(lease)
                return
            try:
                await self._relay(lease)
                return
            except ServerDied as died:
                logger.warning("server %d failed a request: %s", lease.server_id, died)
                if not attempts_left or (self._exchange and self._exchange.answered):
                    text = f"the server of model {lease.model_id!r} failed: {died}"
                    raise UpstreamError(text) from died
                avoid_server_id = lease.server_id
            finally:
                self.broker.release(lease)

    async def _acquire(self, avoid_server_id: int | None) -> Lease:
        acquiring = self.broker.acquire(self.job.model_id, avoid_server_id=avoid_server_id)
        if not self.job.stream:
            return await acquiring
        loop = asyncio.get_running_loop()
        comments = Comments(self.client, self.job, loop)
        try:
            return await acquiring
        finally:
            comments.stop()

    async def _relay(self, lease: Lease) -> None:
        self._exchange = Exchange(self.job, self.client, (lease.host, lease.port), lease.api_key)
        await self._exchange.run()

    def _redirect(self, lease: Lease) -> None:
        """Leave the bytes to nginx, and hold on until the server counts the request itself."""
        self._left_to_nginx = True
        self.client.begin(
            nginx.redirect_head(
                server_id=lease.server_id,
                host=lease.host,
                port=lease.port,
                api_key=lease.api_key,
                target=self.job.target,
                reader=self.job.reader,
            )
        )
        self.client.write(b"")
        self.client.finish()
        loop = asyncio.get_running_loop()
        loop.call_later(nginx.HOLD_S, self.broker.release, lease)

    def _settle(self, task: asyncio.Task[None]) -> None:
        if self.job.permit:
            self.job.permit.give_back()
        if not task.cancelled() and isinstance(task.exception(), ClientStalled):
            self.client.cut()
        super()._settle(task)
        if self.job.on_settled:
            status = None if self._left_to_nginx else self.client.sent_status
            self.job.on_settled(self.job.model_id, status)

    def _is_torn(self) -> bool:
        return self._exchange is not None and self._exchange.torn

    def _readable(self, error: SmartProxyError) -> SmartProxyError:
        return discreet(error) if self.job.discreet else error


class Comments:
    """Signs of life on an event stream that still waits for its model."""

    def __init__(self, client: Client, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._job = job
        self._every_s = every_s = job.sse_wait_comment_after_s
        self._loop = loop
        self._since = loop.time()
        self._timer = loop.call_later(every_s, self._comment)

    def stop(self) -> None:
        self._timer.cancel()

    def _comment(self) -> None:
        if not self._client.began:
            self._client.begin(event_stream_head(self._job.reader))
        waited_s = self._loop.time() - self._since
        self._client.write_event(b": waiting for the model, %d s so far\n\n" % waited_s)
        self._timer = self._loop.call_later(self._every_s, self._comment)


class RelayLoop:
    """The loop that relays, and what goes on in it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = uvloop.new_event_loop()
        self._live: set[Running] = set()

    def start(self, request: Running) -> None:
        """Start a request (any thread)."""
        self.loop.call_soon_threadsafe(self.start_here, request)

    def start_here(self, request: Running) -> None:
        """Start a request (loop thread)."""
        self._live.add(request)
        request.start().add_done_callback(lambda _task: self._live.discard(request))

    def stop_all(self) -> None:
        """End every open request with the error `shutting_down` (loop thread)."""
        for request in tuple(self._live):
            request.stop(ShuttingDown("the proxy is shutting down"))


_lock = threading.Lock()
_current: RelayLoop | None = None


def relay_loop() -> RelayLoop:
    """Return this process's relay loop; without RelayWorker its thread starts at the first call."""
    global _current
    if _current is None or _current.pid != os.getpid():
        with _lock:
            if _current is None or _current.pid != os.getpid():
                _current = RelayLoop()
                # A daemon: a process told to quit at once does not wait for streams.
                run = _current.loop.run_forever
                threading.Thread(target=run, name="relay", daemon=True).start()
    return _current


def run_here() -> RelayLoop:
    """Return this process's relay loop, which the caller promises to run (a worker's start)."""
    global _current
    _current = RelayLoop()
    asyncio.set_event_loop(_current.loop)
    return _current
