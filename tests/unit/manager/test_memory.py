"""The manager gives back what it no longer needs."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from smartproxy.manager.__main__ import give_back_memory
from smartproxy.types import MIB

COUNT, SIZE = 64 << 10, 1 << 10


def resident_bytes() -> int:
    said = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", said, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_was_freed_goes_back_to_the_system() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [library.malloc(SIZE) for _ in range(COUNT)]
    for piece in pieces:
        ctypes.memset(piece, 1, SIZE)
    for piece in pieces[:-1]:  # the last one keeps the top of the heap in use
        library.free(piece)
    before = resident_bytes()
    give_back_memory()
    library.free(pieces[-1])
    assert before - resident_bytes() > 32 * MIB
