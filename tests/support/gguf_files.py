"""Write GGUF files of any shape: full headers, weights as holes, so 80 GB take a few MB of disk.

Our own writer, independent of the reader under test (gguf's reader checks both). The shapes of
real models are in `gguf_shapes`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

ALIGNMENT = 32
VERSION = 3

Value = bool | int | float | str | Sequence[int] | Sequence[bool]
#: number of entries, and their bytes
Entries = tuple[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    dims: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return prod(self.dims) // block * block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model as its header tells it."""

    #: file name without ".gguf"
    name: str
    architecture: str
    #: without the architecture's prefix, except those that start with "general."
    keys: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    #: tokens in the vocabulary that is made up for it
    vocabulary: int
    parts: int = 1


def write(shape: Shape, folder: Path, *, tokenizer: Entries | None = None) -> Path:
    """Write the file (or its parts) into `folder`; return the path of the (first) file.

    tokenizer: entries to use instead of made-up ones (see `copied_tokenizer`).
    """
    per_part = -(-len(shape.tensors) // shape.parts)
    paths = part_paths(shape, folder)
    for part, path in enumerate(paths):
        entries = _model_entries(shape, tokenizer) if part == 0 else []
        if shape.parts > 1:
            entries.append((3, _split_entries(shape, part)))
        tensors = shape.tensors[part * per_part : (part + 1) * per_part]
        write_file(path, entries, tensors)
    return paths[0]


def part_paths(shape: Shape, folder: Path) -> list[Path]:
    if shape.parts == 1:
        return [folder / f"{shape.name}.gguf"]
    count = shape.parts
    return [folder / f"{shape.name}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def write_file(path: Path, entries: Sequence[Entries], tensors: Sequence[Tensor]) -> None:
    """Write one GGUF file whose weights are a hole of the right size."""
    infos, offset = [], 0
    for tensor in tensors:
        infos.append(tensor_info(tensor, offset))
        offset += _padded(tensor.bytes)
    count = sum(entry[0] for entry in entries)
    head = header(tensors=len(tensors), keys=count) + b"".join(entry[1] for entry in entries)
    head += b"".join(infos)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(_padded(len(head)) + offset)


def header(*, tensors: int, keys: int, version: int = VERSION, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def key_value(key: str, value: Value) -> bytes:
    """Return one entry of the key-value section."""
    return string(key) + _typed(value)


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor_info(tensor: Tensor, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
    return string(tensor.name) + dims + struct.pack("<IQ", int(tensor.type), offset)


@lru_cache(maxsize=4)
def made_up_tokenizer(vocabulary: int) -> Entries:
    """Return tokenizer entries of the usual kind and size (tokens, types, merges)."""
    tokens = b"".join(string(f"token{i}") for i in range(vocabulary))
    merges = b"".join(string(f"to {i}") for i in range(vocabulary))
    entries = [
        key_value("tokenizer.ggml.model", "gpt2"),
        _array("tokenizer.ggml.tokens", GGUFValueType.STRING, vocabulary) + tokens,
        _array("tokenizer.ggml.token_type", GGUFValueType.INT32, vocabulary)
        + struct.pack(f"<{vocabulary}i", *[1] * vocabulary),
        _array("tokenizer.ggml.merges", GGUFValueType.STRING, vocabulary) + merges,
        key_value("tokenizer.ggml.bos_token_id", 1),
        key_value("tokenizer.chat_template", "{{ messages }}"),
    ]
    return len(entries), b"".join(entries)


def copied_tokenizer(path: Path) -> Entries:
    """Return a real model's `tokenizer.` entries, byte for byte."""
    data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, 16)
    at, kept = 24, []
    for _ in range(count):
        end = _entry_end(data, at)
        if data.startswith(b"tokenizer.", at + 8):
            kept.append(data[at:end])
        at = end
    return len(kept), b"".join(kept)


def _model_entries(shape: Shape, tokenizer: Entries | None) -> list[Entries]:
    entries = [
        key_value("general.architecture", shape.architecture),
        key_value("general.name", shape.name),
    ]
    for key, value in shape.keys.items():
        full = key if key.startswith("general.") else f"{shape.architecture}.{key}"
        entries.append(key_value(full, value))
    own = (len(entries), b"".join(entries))
    return [own, tokenizer or made_up_tokenizer(shape.vocabulary)]


def _split_entries(shape: Shape, part: int) -> bytes:
    # uint16 and int32, as gguf-split writes them
    return (
        string("split.no")
        + struct.pack("<IH", GGUFValueType.UINT16, part)
        + string("split.count")
        + struct.pack("<IH", GGUFValueType.UINT16, shape.parts)
        + string("split.tensors.count")
        + struct.pack("<Ii", GGUFValueType.INT32, len(shape.tensors))
    )


def _typed(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + string(value)
    if all(isinstance(item, bool) for item in value):
        kind, code = GGUFValueType.BOOL, "?"
    else:
        kind, code = GGUFValueType.INT32, "i"
    items = struct.pack(f"<{len(value)}{code}", *value)
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + items


def _array(key: str, kind: GGUFValueType, count: int) -> bytes:
    return string(key) + struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count)


def _entry_end(data: bytes, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    at += 8 + length
    (kind,) = struct.unpack_from("<I", data, at)
    return _value_end(data, at + 4, GGUFValueType(kind))


def _value_end(data: bytes, at: int, kind: GGUFValueType) -> int:
    if kind == GGUFValueType.STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind == GGUFValueType.ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        at += 12
        for _ in range(count):
            at = _value_end(data, at, GGUFValueType(item))
        return at
    sizes = {1: "UINT8 INT8 BOOL", 2: "UINT16 INT16", 8: "UINT64 INT64 FLOAT64"}
    return at + next((size for size, names in sizes.items() if kind.name in names.split()), 4)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
