"""What runs in the relay's loop for one client: a task, which always ends the client's side."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod

from smartproxy.errors import SmartProxyError
from smartproxy.proxy.relay.client import Client

logger = logging.getLogger(__name__)


class Running(ABC):
    """One piece of work with its client. Loop thread only; cancelled when the client goes."""

    def __init__(self, client: Client, reader: bytes) -> None:
        """reader: the origin whose pages may read an error, `*`, or nothing for nobody."""
        self.client = client
        self._reader = reader
        self._task: asyncio.Task[None] | None = None
        self._stop_reason: SmartProxyError | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin; the task ends with the client's answer."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self.client.on_gone = self._task.cancel
        self._task.add_done_callback(self._settle)
        return self._task

    def stop(self, reason: SmartProxyError) -> None:
        """End it now, telling the client why as far as that is still possible."""
        self._stop_reason = reason
        if self._task:
            self._task.cancel()

    @abstractmethod
    async def _run(self) -> None:
        """Answer the client. What it raises ends the client's side; SmartProxyError tells why."""

    def _is_torn(self) -> bool:
        """Return whether the client's body now ends inside a chunk."""
        return False

    def _readable(self, error: SmartProxyError) -> SmartProxyError:
        """Return an error as this client may read it."""
        return error

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
            logger.error("%s failed", self, exc_info=error)
            error = SmartProxyError("the proxy failed; the log says why")
        self.client.fail(self._readable(error), torn=self._is_torn(), reader=self._reader)
