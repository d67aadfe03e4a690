"""Parse a GGUF header: keys, tensor descriptions, nothing of the weights.

Input are the first bytes of the file, output a `Header`. They are hostile until shown otherwise:
every length is checked before it is used, every count is bounded. Long string arrays
(vocabularies) are jumped over, which turns 30 ms into 3. No I/O here.
Source of the format: llama.cpp b11434, ggml/src/gguf.cpp and docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

Buffer = bytes | bytearray

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
#: elements of one array; the largest vocabularies have a quarter of a million tokens
MAX_ARRAY = 1 << 22
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 256
MAX_DIMS = 4
#: longer arrays are counted, not read
MAX_READ_ARRAY = 4096
#: numbers of all arrays together that are read; past it, arrays are counted
MAX_READ_NUMBERS = 1 << 20
#: strings of all arrays together that are walked one by one: a second's work
MAX_WALKED_STRINGS = 1 << 22
#: of one text; chat templates have a hundred thousand
MAX_TEXT_BYTES = 1 << 26
#: of a text, the rest is passed over: no name that anybody asks for is longer, templates are
MAX_KEPT_BYTES = 1 << 16
#: of a vocabulary, on average: 8 are the length's, and no vocabulary has tokens or merges as short
#: as 4. One that has is walked instead, see `_next_entry`.
LEAST_STRING_BYTES = 12
#: likewise on average, from where the search for the array's end begins
LONGEST_STRING_BYTES = 64
#: shorter string arrays are walked, which is as quick as looking for their end
MIN_JUMPED = 64

_MAGIC = b"GGUF"
#: bytes of a value by its type's number (ggml/include/gguf.h, enum gguf_type); the numbers stand
#: here because importing the gguf package costs 30 MB, and workers look at file heads too
SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
STRING, ARRAY = 8, 9
_U32, _U64, _KIND_COUNT = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
#: seven zero bytes: the high bytes of a key's length, which precede the key itself
_SHORT_LENGTH = b"\0" * 7
_KEY_STARTS = (b"tokenizer.", b"general.", b"quantize.", b"split.")


class BadHeader(Exception):
    """The bytes are not a GGUF header that llama.cpp would read; the text says why."""


class Cut(BadHeader):
    """The bytes end before the header does: of a file's beginning, more of it may help."""


@dataclass(frozen=True, slots=True)
class Counted:
    """An array that was not read."""

    count: int


Scalar = bool | int | float | str
Value = Scalar | list[Scalar] | Counted


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    dims: tuple[int, ...]
    #: ggml type, by number: newer ones than we know may come
    type: int
    #: bytes from the start of the data section
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    keys: dict[str, Value]
    tensors: list[TensorInfo]
    #: bytes from the start of the file
    data_offset: int


def parse_header(data: Buffer, *, jump: bool = True, whole: bool = True) -> Header:
    """Return the header at the start of `data`; raises BadHeader.

    jump: look for the end of long string arrays instead of walking them. Where what is found
    makes no sense, the whole is walked after all. whole: `data` is the whole file; else Cut is
    raised where more of it is needed.
    """
    if jump:
        try:
            return _parse(data, jump=True)
        except Cut:
            if not whole:
                raise
        except BadHeader:
            pass
    return _parse(data, jump=False)


@dataclass(slots=True)
class _Work:
    """One pass over a header's keys, and how much work it may still cause."""

    data: Buffer
    #: long string arrays are jumped over, not walked
    jump: bool
    #: how names of keys begin
    starts: tuple[bytes, ...] = _KEY_STARTS
    numbers_left: int = MAX_READ_NUMBERS
    strings_left: int = MAX_WALKED_STRINGS


def _parse(data: Buffer, *, jump: bool) -> Header:
    try:
        tensor_count, key_count = _counts(data)
        keys, at = _keys(_Work(data, jump), key_count)
        tensors, at = _tensors(data, at, tensor_count)
    except struct.error:
        raise Cut("the file ends inside its header") from None
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise BadHeader(f"general.alignment is {alignment!r}")
    return Header(keys, tensors, -(-at // alignment) * alignment)


def _counts(data: Buffer) -> tuple[int, int]:
    if len(data) < 4 or data[:4] != _MAGIC:
        raise BadHeader("not a GGUF file (it does not start with 'GGUF')")
    (version,) = _U32.unpack_from(data, 4)
    if version & 0xFFFF == 0:
        raise BadHeader("a big-endian GGUF file, which llama.cpp does not load on this machine")
    if version not in (2, 3):
        raise BadHeader(f"GGUF version {version} is not supported (2 and 3 are)")
    (tensor_count,), (key_count,) = _U64.unpack_from(data, 8), _U64.unpack_from(data, 16)
    if tensor_count > MAX_TENSORS:
        raise BadHeader(f"it claims {tensor_count} tensors (at most {MAX_TENSORS})")
    if key_count > MAX_KEYS:
        raise BadHeader(f"it claims {key_count} keys (at most {MAX_KEYS})")
    return tensor_count, key_count


def _keys(work: _Work, count: int) -> tuple[dict[str, Value], int]:
    data = work.data
    keys: dict[str, Value] = {}
    at = 24
    for index in range(count):
        key, at = _text(data, at, MAX_KEY_BYTES, "a key")
        (kind,) = _U32.unpack_from(data, at)
        at += 4
        if kind == ARRAY:
            # after the last key come tensors of any name: nothing to look for
            keys[key], at = _array(work, at, key, last=index + 1 == count)
        elif kind == STRING:
            keys[key], at = _text(data, at, MAX_TEXT_BYTES, key)
        else:
            scalar = _scalar(kind, key)
            (keys[key],) = scalar.unpack_from(data, at)
            at += scalar.size
        if key == "general.architecture":
            work.starts = (*_KEY_STARTS, str(keys[key]).encode() + b".")
    return keys, at


def _scalar(kind: int, key: str) -> struct.Struct:
    scalar = SCALARS.get(kind)
    if scalar is None:
        raise BadHeader(f"{key!r} has the unknown value type {kind}")
    return scalar


def _text(data: Buffer, at: int, limit: int, what: str) -> tuple[str, int]:
    (length,) = _U64.unpack_from(data, at)
    start = at + 8
    if length > limit:
        raise BadHeader(f"{what} is said to be {length} bytes long (at most {limit})")
    if length > len(data) - start:
        raise Cut(f"{what} is said to be {length} bytes long")
    end = start + length
    return data[start : min(end, start + MAX_KEPT_BYTES)].decode("utf-8", "replace"), end


def _array(work: _Work, at: int, key: str, *, last: bool) -> tuple[Value, int]:
    """Return an array's value and where it ends. last: no other key follows it."""
    kind, count = _KIND_COUNT.unpack_from(work.data, at)
    at += 12
    if count > MAX_ARRAY:
        raise BadHeader(f"{key!r} claims {count} elements (at most {MAX_ARRAY})")
    if kind == ARRAY:
        raise BadHeader(f"{key!r} is an array of arrays, which llama.cpp does not read")
    if kind == STRING:
        if work.jump and not last and count > MIN_JUMPED:
            at += LEAST_STRING_BYTES * count
            end = at + LONGEST_STRING_BYTES * count
            return Counted(count), _next_entry(work.data, (at, end), work.starts)
        return Counted(count), _walk_strings(work, at, count)
    scalar = _scalar(kind, key)
    end = at + count * scalar.size
    if end > len(work.data):
        raise Cut(f"{key!r} runs past the end of the file")
    if count > min(MAX_READ_ARRAY, work.numbers_left):
        return Counted(count), end
    work.numbers_left -= count
    return list(struct.unpack_from(f"<{count}{scalar.format[1:]}", work.data, at)), end


def _walk_strings(work: _Work, at: int, count: int) -> int:
    work.strings_left -= count
    if work.strings_left < 0:
        raise BadHeader(f"its arrays hold more than {MAX_WALKED_STRINGS} strings")
    data, unpack, size = work.data, _U64.unpack_from, len(work.data)
    for _ in range(count):
        at += 8 + unpack(data, at)[0]
        if at > size:
            raise Cut("a string runs past the end of the file")
    return at


def _next_entry(data: Buffer, within: tuple[int, int], starts: tuple[bytes, ...]) -> int:
    """Return where the next entry begins: at the length before the first known start of a name.

    within: from, to; without an end the search could read all weights.

    A wrong guess (an entry of another kind overlooked) gives nonsense at the end of the header
    at the latest, because then one entry too many is read; the caller walks.
    """
    for start in starts:
        position = data.find(_SHORT_LENGTH + start, *within)
        if position > 0:
            return position - 1
    kind = Cut if within[1] > len(data) else BadHeader
    raise kind("no entry after an array of strings")


def _tensors(data: Buffer, at: int, count: int) -> tuple[list[TensorInfo], int]:
    tensors = []
    for _ in range(count):
        name, at = _text(data, at, MAX_NAME_BYTES, "a tensor's name")
        (dim_count,) = _U32.unpack_from(data, at)
        if dim_count > MAX_DIMS:
            raise BadHeader(f"tensor {name!r} has {dim_count} dimensions (at most {MAX_DIMS})")
        dims = struct.unpack_from(f"<{dim_count}Q", data, at + 4)
        at += 4 + 8 * dim_count
        kind, offset = _KIND_COUNT.unpack_from(data, at)
        at += 12
        tensors.append(TensorInfo(name, dims, kind, offset))
    return tensors, at
