"""One of the processes that `serve` starts, and starts again whenever it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from smartproxy.lifetime import PARENT_VARIABLE

logger = logging.getLogger(__name__)

#: a half that lived shorter than this is started again only after a pause
SHORT_LIFE_S = 3.0
PAUSE_S = 1.0


@dataclass(slots=True, kw_only=True)
class Half:
    """Its command, the process that runs it now, and those that are on their way out."""

    name: str
    argv: list[str]
    pass_fds: tuple[int, ...] = ()
    stdin: int = subprocess.DEVNULL
    #: words that it takes: held back until it has handlers for them
    held_signals: frozenset[signal.Signals] = frozenset()
    #: what asks it to end in order
    stop_signal: signal.Signals = signal.SIGTERM
    #: what has it end on the spot
    quit_signal: signal.Signals = signal.SIGKILL
    process: subprocess.Popen[bytes] | None = None
    #: earlier processes that finish what they began, while `process` has taken over
    leaving: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started_at: float = 0.0
    not_before: float = 0.0

    def start(self, env: Mapping[str, str]) -> None:
        """Start it in a session of its own: the terminal's Ctrl-C is ours to pass on."""
        self.started_at = time.monotonic()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.held_signals)
        try:
            self.process = subprocess.Popen(
                self.argv,
                env={**env, PARENT_VARIABLE: str(os.getpid())},
                pass_fds=self.pass_fds,
                stdin=self.stdin,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def start_again(self, env: Mapping[str, str], code: int) -> None:
        """Start it in place of a process that has ended, not too often."""
        now = time.monotonic()
        if self.not_before <= self.started_at:  # its end is news
            short = now - self.started_at < SHORT_LIFE_S
            self.not_before = now + (PAUSE_S if short else 0.0)
            logger.warning("%s ended with code %d: starting it again", self.name, code)
        if now >= self.not_before:
            self.start(env)

    def relieve(self, env: Mapping[str, str]) -> None:
        """Start a process beside one that is on its way out and takes no more work."""
        if self.process is not None and self.process.poll() is None:
            logger.warning("%s was told to stop: another takes over at once", self.name)
            self.leaving.append(self.process)
            self.start(env)

    def reap_leaving(self) -> None:
        self.leaving = [process for process in self.leaving if process.poll() is None]

    def living(self) -> list[subprocess.Popen[bytes]]:
        """Return its processes that have not ended."""
        mine = [*self.leaving, *([self.process] if self.process else [])]
        return [process for process in mine if process.poll() is None]

    def send(self, number: signal.Signals) -> None:
        for process in self.living():
            process.send_signal(number)

    def kill(self) -> None:
        """End it without asking."""
        for process in self.living():
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a device or a disk
                process.wait(1.0)
