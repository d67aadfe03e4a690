"""What a projector (mmproj) takes: its weights, and the graph of one picture or sound.

Input: a GGUF header; output: bytes. Weights are the file's size. The graph is a rule that stays
above a vision transformer's widest moment; nobody here measured it (docs/memory.md), the first load
of each model corrects it.
Source: llama.cpp b11434, tools/mtmd/clip.cpp (warm-up sizes, hyperparameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from smartproxy.manager.compute_buffer import FLASH_HEAD_LENGTHS
from smartproxy.manager.gguf_header import Header
from smartproxy.manager.metadata import read_header

_F32 = 4
#: projectors that take pictures of any size are tried with 46 x 46 merged patches of 2 x 2
_DYNAMIC = ("qwen2", "qwen3", "pixtral", "lightonocr", "kimivl", "glm4v", "dots", "paddleocr")
_DYNAMIC_PATCHES = 4 * 46 * 46
#: positions of a Whisper encoder for its 30 seconds, before they are halved
_SOUND_POSITIONS = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    weights_bytes: int
    compute_bytes: int


def read_projector(path: Path) -> Projector:
    """Return what a projector file takes; raises MetadataError where it is none."""
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, size_bytes: int, _mtime_ns: int) -> Projector:
    header = read_header(path)
    kinds = ("vision", _patches(header)), ("audio", _SOUND_POSITIONS)
    graphs = [_graph_bytes(header, kind, positions) for kind, positions in kinds]
    return Projector(weights_bytes=size_bytes, compute_bytes=max(graphs))


def _patches(header: Header) -> int:
    patch = _number(header, "clip.vision.patch_size") or 14
    fixed = (_number(header, "clip.vision.image_size") // patch) ** 2 + 1
    kind = str(
        header.keys.get("clip.projector_type") or header.keys.get("clip.vision.projector_type")
    )
    return max(fixed, _DYNAMIC_PATCHES) if kind.startswith(_DYNAMIC) else fixed


def _graph_bytes(header: Header, kind: str, positions: int) -> int:
    """Return the widest moment: feed-forward or attention, beside what lives throughout."""
    width = _number(header, f"clip.{kind}.embedding_length")
    heads = _number(header, f"clip.{kind}.attention.head_count")
    inner = _number(header, f"clip.{kind}.feed_forward_length")
    if not width or not heads:
        return 0
    attention = 4 * width * positions
    if width // heads not in FLASH_HEAD_LENGTHS:
        attention += heads * positions * positions
    return _F32 * (4 * width * positions + max(2 * inner * positions, attention))


def _number(header: Header, key: str) -> int:
    value = header.keys.get(key)
    return value if isinstance(value, int) else 0
