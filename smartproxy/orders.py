"""What signals ask of the manager: to leave, to end everything, to read the configuration again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from smartproxy.lifetime import HELD_SIGNALS


class Orders:
    """Written by the signals' handlers, in the main thread. Makes the handlers."""

    def __init__(self) -> None:
        #: the main loop ends
        self.stopping = threading.Event()
        #: end the llama-servers too
        self.full_stop = False
        self.reload = False
        #: wakes the main loop; the doorbell's as soon as there is one
        self.poke: Callable[[], None] = _nothing
        #: ends the llama-servers on the spot, in a thread: it takes locks that we may hold
        self.kill_servers: Callable[[], None] = _nothing
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGHUP, self._reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    def _leave(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping.set()
        self.poke()

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        if self.full_stop:
            threading.Thread(target=self.kill_servers, name="kill").start()
        self.full_stop = True
        self.stopping.set()
        self.poke()

    def _reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reload = True
        self.poke()


def _nothing() -> None:
    """What a signal does before there is anything to do it to."""
