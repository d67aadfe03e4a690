"""Something to wait for that ends with one answer of ours: no thread waits, and the client may go.

The way in from a view of Flask's is `ErrandResponse`, as `RelayResponse` is for relayed requests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from flask import Response

from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.relay.relay import HandedOver
from smartproxy.proxy.relay.running import Running
from smartproxy.proxy.wire.own_answers import OwnAnswer

Work = Callable[[], Awaitable[OwnAnswer]]


class Errand(Running):
    """One piece of work with its client."""

    def __init__(self, work: Work, client: Client, reader: bytes) -> None:
        """work: raises SmartProxyError."""
        super().__init__(client, reader)
        self._work = work

    def __str__(self) -> str:
        return "a request"

    async def _run(self) -> None:
        self.client.answer(await self._work())


class HandedOverErrand(HandedOver):
    """The answer of a WSGI application to a request that waits for something."""

    def __init__(self, work: Work, reader: bytes, start_response: Callable[..., Any]) -> None:
        self._work = work
        self._reader = reader
        self._start_response = start_response
        self._client = None

    def for_client(
        self, client: Client, on_body_done: Callable[[], None] | None = None, *, direct: bool
    ) -> Errand:
        return Errand(self._work, client, self._reader)


class ErrandResponse(Response):
    """What a view of Flask's returns to answer later."""

    def __init__(self, work: Work, reader: bytes) -> None:
        super().__init__()
        self._work = work
        self._reader = reader

    def __call__(self, environ: Any, start_response: Any) -> HandedOver:
        return HandedOverErrand(self._work, self._reader, start_response)
