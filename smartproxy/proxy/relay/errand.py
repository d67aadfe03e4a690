"""Something to wait for that ends with one answer of ours: no thread waits, and the client may go.

The way in from a view of Flask's is `ErrandResponse`, as `RelayResponse` is for relayed requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from flask import Response

from smartproxy.errors import SmartProxyError
from smartproxy.proxy.relay.client import Client
from smartproxy.proxy.relay.relay import HandedOver
from smartproxy.proxy.wire.own_answers import OwnAnswer

logger = logging.getLogger(__name__)

Work = Callable[[], Awaitable[OwnAnswer]]


@dataclass(slots=True, kw_only=True, eq=False)
class Errand:
    """One piece of work with its client. Loop thread only; cancelled when the client goes."""

    #: raises SmartProxyError
    work: Work
    client: Client
    #: the origin whose pages may read an error, `*`, or nothing for nobody
    reader: bytes
    _task: asyncio.Task[None] | None = None
    _stop_reason: SmartProxyError | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin; the task ends with the client's answer."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self.client.on_gone = self._task.cancel
        self._task.add_done_callback(self._settle)
        return self._task

    def stop(self, reason: SmartProxyError) -> None:
        """End it now, telling the client why."""
        self._stop_reason = reason
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        self.client.answer(await self.work())

    def _settle(self, task: asyncio.Task[None]) -> None:
        error: BaseException | None = self._stop_reason
        if not task.cancelled():
            error = task.exception()
        if self.client.ended:
            return
        if error is None:  # it went
            self.client.cut()
            return
        if not isinstance(error, SmartProxyError):
            logger.error("a request failed", exc_info=error)
            error = SmartProxyError("the proxy failed; the log says why")
        self.client.fail(error, torn=False, reader=self.reader)


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
        return Errand(work=self._work, client=client, reader=self._reader)


class ErrandResponse(Response):
    """What a view of Flask's returns to answer later."""

    def __init__(self, work: Work, reader: bytes) -> None:
        super().__init__()
        self._work = work
        self._reader = reader

    def __call__(self, environ: Any, start_response: Any) -> HandedOver:
        return HandedOverErrand(self._work, self._reader, start_response)
