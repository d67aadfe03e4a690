"""Headers that lie: each is refused, or read in bounded time and memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from smartproxy.errors import MetadataError
from smartproxy.model_file.header import (
    MAX_ARRAY,
    MAX_KEPT_BYTES,
    MAX_READ_NUMBERS,
    MAX_TEXT_BYTES,
    BadHeader,
    Counted,
    Cut,
    parse_header,
)
from smartproxy.model_file.kind import GgufKind, gguf_kind
from smartproxy.model_file.metadata import read_header
from tests.support import gguf_files, gguf_shapes

STRING, ARRAY, UINT32 = 8, 9, 4


def head(key_count: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, key_count)


def key(name: str, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind)


def array(name: str, kind: int, count: int) -> bytes:
    return key(name, ARRAY) + struct.pack("<IQ", kind, count)


def test_a_long_text_is_passed_over_without_being_kept() -> None:
    length = 50 << 20
    text = key("tokenizer.huggingface.json", STRING) + struct.pack("<Q", length) + bytes(length)
    data = head(2) + text + key("general.alignment", UINT32) + struct.pack("<I", 64)
    tracemalloc.start()
    parsed = parse_header(data)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parsed.keys["general.alignment"] == 64
    assert len(str(parsed.keys["tokenizer.huggingface.json"])) <= MAX_KEPT_BYTES
    assert most_bytes < 4 << 20


def test_a_text_longer_than_the_file_is_refused() -> None:
    data = head(1) + key("general.name", STRING) + struct.pack("<Q", 200 << 30)
    with pytest.raises(BadHeader, match="said to be"):
        parse_header(data)


def test_many_arrays_of_empty_strings_are_refused_before_they_are_walked() -> None:
    full = array("a", STRING, MAX_ARRAY) + bytes(8 * MAX_ARRAY)
    with pytest.raises(BadHeader, match="more than 4194304 strings"):
        parse_header(head(2) + full + array("b", STRING, 1) + bytes(8), jump=False)


def test_numbers_are_counted_once_enough_were_read() -> None:
    numbers = struct.pack("<4096I", *range(4096))
    count = MAX_READ_NUMBERS // 4096 + 3
    data = head(count) + b"".join(array(f"k{i}", UINT32, 4096) + numbers for i in range(count))
    parsed = parse_header(data)
    assert isinstance(parsed.keys["k0"], list)
    assert parsed.keys[f"k{count - 1}"] == Counted(4096)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(make: object, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert callable(make)
    make(path)
    with pytest.raises(MetadataError, match=r"model\.gguf"):
        read_header(path)
    assert gguf_kind(path) is GgufKind.MODEL


def test_of_a_files_beginning_the_header_is_the_same_or_more_is_asked_for(tmp_path: Path) -> None:
    body = gguf_shapes.Body(
        width=64, layers=3, heads=2, kv_heads=2, head=32, inner=128, vocabulary=1024
    )
    path = gguf_files.write(gguf_shapes.transformer("m.F16", "llama", body), tmp_path)
    whole = parse_header(path.read_bytes())
    data = path.read_bytes()[: whole.data_offset + 100]
    for size in (*range(24, len(data), 97), len(data)):
        try:
            assert parse_header(data[:size], whole=False) == whole
        except Cut:
            assert size < whole.data_offset


def test_a_text_that_is_said_to_be_huge_is_refused_before_it_is_read() -> None:
    huge = head(1) + key("general.name", STRING) + struct.pack("<Q", MAX_TEXT_BYTES + 1)
    with pytest.raises(BadHeader, match="at most"):
        parse_header(huge, whole=False)
