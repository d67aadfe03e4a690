"""Signs that children give `serve`: a worker is up, gunicorn leaves, the manager's loop goes on.

They travel in a pipe and in a piece of memory that children inherit, never by disk: a full or slow
disk must not make a healthy process look dead. Run without `serve`, a child gives no sign.
"""

from __future__ import annotations

import os
import stat
import struct
import time

#: a worker accepts connections; gunicorn's master was told to stop
UP, LEAVING = b"u", b"l"
#: where a child finds the pipe, and the memory: descriptor and inode
PIPE_VARIABLE = "SMARTPROXY_SIGN_PIPE"
BEAT_VARIABLE = "SMARTPROXY_SIGN_BEAT"
#: pid, and time.monotonic() of the last finished pass (the same clock in all processes)
BEAT = struct.Struct("qd")
#: in place of a time: the loop has ended on purpose
RESTING = float("inf")


class Signs:
    """The side of `serve`, which makes both before it starts anything."""

    def __init__(self) -> None:
        #: the pipe's end to read from; its own end says that nobody is left who could tell
        self.ear, self.pipe = os.pipe()
        os.set_blocking(self.ear, False)
        os.set_blocking(self.pipe, False)
        self.beat = os.memfd_create("smartproxy-beat")
        os.pwrite(self.beat, BEAT.pack(0, 0.0), 0)

    def environment(self) -> dict[str, str]:
        """Return what tells children where to give their signs."""
        return {PIPE_VARIABLE: _named(self.pipe), BEAT_VARIABLE: _named(self.beat)}

    def heard(self) -> bytes:
        """Return the words that came since; never blocks."""
        try:
            return os.read(self.ear, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Let go of the end that children write to: nobody is started any more."""
        os.close(self.pipe)

    def last_pass(self, pid: int) -> float | None:
        """Return time.monotonic() of a manager's last finished pass; None: it finished none yet."""
        whose, at = BEAT.unpack(os.pread(self.beat, BEAT.size, 0))
        return at if whose == pid else None


def tell(word: bytes) -> None:
    """Send a word to `serve`, if it started us."""
    descriptor = _found(PIPE_VARIABLE)
    if descriptor is not None:
        try:
            os.write(descriptor, word)
        except OSError:
            return  # it is gone, or has enough to read


class Beat:
    """The side of the manager."""

    def __init__(self) -> None:
        self._descriptor = _found(BEAT_VARIABLE)
        if self._descriptor is not None:
            os.set_inheritable(self._descriptor, False)
        #: time.monotonic() of the last finished pass; written by the loop, read by the heartbeat
        self.at = time.monotonic()

    def passed(self) -> None:
        """Say that the loop has just finished a pass. Takes microseconds."""
        self.at = time.monotonic()
        self._write(self.at)

    def rests(self) -> None:
        """Say that no pass comes any more, on purpose: `serve` then waits without limit."""
        self._write(RESTING)

    def _write(self, at: float) -> None:
        if self._descriptor is not None:
            os.pwrite(self._descriptor, BEAT.pack(os.getpid(), at), 0)


def _named(descriptor: int) -> str:
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def _found(variable: str) -> int | None:
    """Return an inherited descriptor; None where it is not the one that was named."""
    number, _, inode = os.environ.get(variable, "").partition(":")
    if not number:
        return None
    try:
        found = os.fstat(int(number))
    except OSError:
        return None
    kinds = stat.S_ISFIFO(found.st_mode) or stat.S_ISREG(found.st_mode)
    return int(number) if kinds and found.st_ino == int(inode) else None
