"""A datagram socket that wakes the manager: a hint only, the state file alone is enough.

"look" asks for a fresh look at the GPUs besides.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Iterator, Set
from pathlib import Path

#: in the state directory
NAME = "manager.sock"


class Doorbell:
    """The manager's side: sleeps until poked, until a child ends, or until a timeout."""

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / NAME
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with _in_folder(state_dir):  # a socket path may be 107 bytes at most
            self._socket.bind(NAME)
        path.chmod(0o600)
        self._socket.setblocking(False)
        self._own, self._own_write = os.pipe()
        os.set_blocking(self._own, False)
        os.set_blocking(self._own_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._own, selectors.EVENT_READ)
        #: by pid: a descriptor that is readable once the process has ended; main thread only
        self._watched: dict[int, int] = {}

    def poke(self) -> None:
        """Wake the loop from another thread or a signal handler."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._own_write, b"\0")

    def watch(self, pids: Set[int]) -> None:
        """Wake the loop when one of these processes ends."""
        for pid in self._watched.keys() - pids:
            self._forget(pid)
        for pid in pids - self._watched.keys():
            with contextlib.suppress(OSError):  # gone already: the next tick sees it
                self._watched[pid] = os.pidfd_open(pid)
                self._selector.register(self._watched[pid], selectors.EVENT_READ)

    def _forget(self, pid: int) -> None:
        descriptor = self._watched.pop(pid)
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def wait(self, timeout_s: float) -> set[bytes]:
        """Block until something happens; returns the words workers sent."""
        words: set[bytes] = set()
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._socket:
                words |= self._drain_socket()
            elif key.fileobj == self._own:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._own, 4096)
            else:
                # readable for ever from now on: one wake-up is enough
                ended = [pid for pid, fd in self._watched.items() if fd == key.fileobj]
                for pid in ended:
                    self._forget(pid)
        return words

    def _drain_socket(self) -> set[bytes]:
        words = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                words.add(self._socket.recv(64))
        return words


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def ring(state_dir: Path, word: bytes) -> bool:
    """Send a word to the manager, by its folder's descriptor: a path may be too long.

    Returns whether a manager is there to read it.
    """
    try:
        folder = os.open(state_dir, os.O_PATH)
    except OSError:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(word, f"/proc/self/fd/{folder}/{NAME}")
    except BlockingIOError:
        return True  # it has not read those before yet
    except OSError:
        return False
    finally:
        os.close(folder)
    return True
