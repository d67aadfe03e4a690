"""Is a .gguf file a model, a projector, or something else? Asked of name and first bytes only."""

from __future__ import annotations

import struct
from enum import StrEnum
from pathlib import Path

from smartproxy.model_file.header import SCALARS, STRING
from smartproxy.model_file.opening import open_regular

_HEAD_BYTES = 4096


class GgufKind(StrEnum):
    MODEL = "model"
    PROJECTOR = "projector"
    #: adapters, importance matrices, control vectors, vocabularies
    OTHER = "other"


def gguf_kind(path: Path) -> GgufKind:
    """Return what the file is; one that says nothing, or can't be read, counts as a model.

    So that a broken file shows up under its name with an error of its own, instead of vanishing.
    """
    if "mmproj" in path.name.lower():
        return GgufKind.PROJECTOR
    texts = _first_texts(path)
    architecture, kind = texts.get("general.architecture"), texts.get("general.type", "model")
    if architecture == "clip" or kind == "mmproj":
        return GgufKind.PROJECTOR
    if architecture == "controlvector" or kind in ("adapter", "imatrix", "vocab"):
        return GgufKind.OTHER
    return GgufKind.MODEL


def _first_texts(path: Path) -> dict[str, str]:
    """Return the text values at the start of the header, up to the first array."""
    texts: dict[str, str] = {}
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return texts
    if head[:4] != b"GGUF":
        return texts
    position = 24  # magic, version, number of tensors, number of keys
    try:
        while True:
            key, position = _text(head, position)
            (type_,) = struct.unpack_from("<I", head, position)
            position += 4
            if type_ == STRING:
                texts[key], position = _text(head, position)
            else:
                position += SCALARS[type_].size
    except (struct.error, KeyError, UnicodeDecodeError):
        return texts


def _text(head: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, position)
    end = position + 8 + length
    if end > len(head):
        raise struct.error("beyond what was read")
    return head[position + 8 : end].decode(), end
