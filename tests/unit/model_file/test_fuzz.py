"""Real headers with bytes changed, cut and repeated: each is read, or refused by our own error."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smartproxy.errors import MetadataError
from smartproxy.model_file.kind import GgufKind, gguf_kind
from smartproxy.model_file.metadata import projector_header, read_metadata
from smartproxy.model_file.types import ModelMetadata
from tests.support import gguf_files, gguf_shapes, gguf_special
from tests.support.examples import examples

#: far above what a header of a few kB takes, far below what a lie in it would
MOST_BYTES = 64 << 20
SMALL = gguf_shapes.Body(
    width=256, layers=2, heads=4, kv_heads=2, head=64, inner=512, vocabulary=40, trained=4096
)
#: numbers that lengths and counts lie with
LIES = [0, 1, 7, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def real(folder: Path) -> list[bytes]:
    """Return headers of real shapes, their weights left out."""
    small = gguf_files.write(gguf_shapes.transformer("tiny.Q4_K_M", "llama", SMALL), folder)
    other = gguf_files.write(gguf_special.mamba2("other.Q4_K_M", SMALL), folder)
    return [path.read_bytes()[:8192] for path in (small, other)]


def change(data: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """Return the data changed at places that are given as parts of its length."""
    changed = bytearray(data)
    for kind, place, number, text in edits:
        at = int(place * len(changed))
        if kind == "number":
            changed[at : at + 8] = LIES[number % len(LIES)].to_bytes(8, "little")
        elif kind == "bytes":
            changed[at : at + len(text)] = text
        elif kind == "insert":
            changed[at:at] = text
        elif kind == "repeat":
            changed[at:at] = changed[at : at + number % 500]
        elif kind == "delete":
            del changed[at : at + number % 50]
        else:
            del changed[at:]
    return bytes(changed)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["number", "bytes", "insert", "repeat", "delete", "cut"]),
        # lengths and counts stand at the beginning
        st.floats(0, 1) | st.floats(0, 0.05),
        st.integers(0, 10_000),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def read(path: Path) -> None:
    """Read a file in all ways there are; raises what none of them may."""
    for reader in (read_metadata, projector_header):
        told = ""
        try:
            assert isinstance(reader(path), ModelMetadata | tuple)
        except MetadataError as refused:
            told = str(refused)
        assert len(told.splitlines()) <= 1
    assert gguf_kind(path) in GgufKind


def read_bounded(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@settings(
    max_examples=examples(400),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(which=st.integers(0, 1), edits=EDITS)
def test_any_change_of_a_real_header_is_read_or_refused(
    folder: Path, real: list[bytes], which: int, edits: list[tuple[str, float, int, bytes]]
) -> None:
    read_bounded(folder / "changed.gguf", change(real[which], edits))


@settings(max_examples=examples(200), deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_behind_a_magic_number_are_read_or_refused(folder: Path, data: bytes) -> None:
    for start in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00"):
        read_bounded(folder / "bytes.gguf", start + data)
