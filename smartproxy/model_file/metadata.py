"""Read what a GGUF file says of its model, in milliseconds and whatever the file's size.

Input: a path; output: `ModelMetadata`, which also goes to JSON and back for the cache in the
state file. Reads headers only, never weights. Touches no state.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from smartproxy.errors import MetadataError
from smartproxy.model_file import architectures, keys
from smartproxy.model_file.header import BadHeader, Cut, Header, parse_header
from smartproxy.model_file.opening import open_regular
from smartproxy.model_file.tensors import TensorSums, sum_tensors
from smartproxy.model_file.types import FileSpan, LayerTensors, ModelMetadata

MAX_PARTS = 999
#: of a file, until its header is whole: most are done at the second, vocabularies of a quarter of
#: a million tokens at the third
READ_BYTES = tuple(size << 20 for size in (1, 8, 32, 128))
READ_AT_ONCE_BYTES = 4 << 20
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_metadata(path: Path) -> ModelMetadata:
    """Return a model's metadata; of a file in parts, `path` is the first.

    Raises MetadataError, which names the file and says what is wrong with it.
    """
    header, size = _read_header(path)
    paths = [path, *_other_parts(path, header)]
    parts = [(header, size), *(_read_header(part) for part in paths[1:])]
    try:
        return _metadata(paths, parts)
    except BadHeader as error:
        raise MetadataError(f"{path}: {error}") from None


def read_header(path: Path) -> Header:
    """Return one file's header as it stands; raises MetadataError."""
    return _read_header(path)[0]


def projector_header(path: Path) -> tuple[Header, int]:
    """Return a projector file's header and its bytes on disk; read again only when it changed.

    Raises MetadataError or OSError where it can't be read.
    """
    stat = path.stat()
    return _header_of(path, (stat.st_size, stat.st_mtime_ns)), stat.st_size


@lru_cache(maxsize=64)
def _header_of(path: Path, _stamp: tuple[int, int]) -> Header:
    return read_header(path)


def to_json(metadata: ModelMetadata) -> str:
    """Return metadata as JSON text, for a cache."""
    return json.dumps(dataclasses.asdict(metadata), separators=(",", ":"))


def from_json(text: str) -> ModelMetadata:
    """Return what `to_json` was given; raises MetadataError where another version wrote it."""
    try:
        values: dict[str, Any] = json.loads(text)
        values["layers"] = tuple(_layer(layer) for layer in values["layers"])
        values["output"] = _layer(values["output"])
        values["input_spans"] = _spans(values["input_spans"])
        for key, value in values.items():
            values[key] = tuple(value) if isinstance(value, list) else value
        return ModelMetadata(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MetadataError(f"cached metadata can't be read: {error}") from None


def _read_header(path: Path) -> tuple[Header, int]:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise BadHeader("the file is empty")
            return _parse_beginning(file.fileno(), size), size
    except OSError as error:
        raise MetadataError(f"{path}: {error.strerror or error}") from None
    except (BadHeader, ValueError) as error:
        raise MetadataError(f"{path}: {error}") from None


def _parse_beginning(descriptor: int, size: int) -> Header:
    """Read as much of a file as its header needs.

    Not mapped into memory: a file system that hangs would hold the interpreter's lock with it, and
    a file that is cut meanwhile would kill us.
    """
    data = bytearray()
    for wanted in READ_BYTES:
        _read_on(descriptor, data, min(wanted, size))
        try:
            return parse_header(data, whole=len(data) >= size)
        except Cut:
            if len(data) >= size:
                raise
    raise BadHeader(f"its header is longer than {READ_BYTES[-1] >> 20} MB")


def _read_on(descriptor: int, data: bytearray, wanted: int) -> None:
    while len(data) < wanted:
        more = os.pread(descriptor, min(READ_AT_ONCE_BYTES, wanted - len(data)), len(data))
        if not more:
            return  # it was cut meanwhile
        data += more


def _other_parts(path: Path, header: Header) -> list[Path]:
    count = header.keys.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return []
    if count > MAX_PARTS:
        raise MetadataError(f"{path}: it claims {count} parts (at most {MAX_PARTS})")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise MetadataError(
            f"{path}: part of a model in {count} files, but its name does not end in"
            f" -00001-of-{count:05d}.gguf"
        )
    if int(match["part"]) != 1:
        raise MetadataError(f"{path}: part {int(match['part'])} of {count}; name the first part")
    others = [
        path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)
    ]
    for other in others:
        if not other.is_file():
            raise MetadataError(f"{path}: its part {other.name} is missing")
    return others


def _metadata(paths: list[Path], parts: list[tuple[Header, int]]) -> ModelMetadata:
    header = parts[0][0]
    architecture = keys.architecture_of(header)
    _refuse_other_files(architecture)
    layers, skipped = keys.layer_count(header), keys.prediction_layers(header)
    _check_tensor_count(parts)
    sums = sum_tensors(parts, architecture, layers, skipped)
    facts = keys.facts(header)
    for needed in ("layer_count", "embedding_length"):
        if not facts[needed]:
            raise BadHeader(f"{needed.replace('_', ' ')} is missing: not a language model")
    heads = max(facts["head_counts"], default=0)
    return ModelMetadata(
        files=tuple(str(path) for path in paths),
        file_bytes=sum(size for _, size in parts),
        unknown=_unknown(architecture, sums),
        query_length=sums.query_length or heads * facts["key_length"],
        parameters=sums.parameters,
        quantization=sums.quantization,
        layers=sums.layers,
        output=sums.output,
        input_bytes=sums.input_bytes,
        input_spans=sums.input_spans,
        **facts,
    )


def _refuse_other_files(architecture: str) -> None:
    if architecture == "clip":
        raise BadHeader("a projector (mmproj), not a model; set it as `mmproj` of its model")


def _check_tensor_count(parts: list[tuple[Header, int]]) -> None:
    expected = parts[0][0].keys.get("split.tensors.count")
    found = sum(len(header.tensors) for header, _ in parts)
    if found == 0:
        raise BadHeader("it holds no tensors (a vocabulary only?)")
    if isinstance(expected, int) and len(parts) > 1 and expected != found:
        raise BadHeader(f"its parts hold {found} tensors, it says {expected}")


def _unknown(architecture: str, sums: TensorSums) -> str | None:
    if architecture not in architectures.KNOWN:
        return f"architecture {architecture!r}"
    if sums.unknown_types:
        return "tensor type " + ", ".join(str(kind) for kind in sums.unknown_types)
    return None


def _layer(values: dict[str, Any]) -> LayerTensors:
    spans = {key: _spans(values[key]) for key in ("spans", "expert_spans")}
    return LayerTensors(**{**values, **spans})


def _spans(values: list[dict[str, int]]) -> tuple[FileSpan, ...]:
    return tuple(FileSpan(**value) for value in values)
