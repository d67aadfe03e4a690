"""What a projector (mmproj) takes: its weights, and the graph of one picture or sound.

Input: a GGUF header; output: bytes. Weights are the file's size. The graph is a rule that stays
above what llama-server b10068 reserved for five vision towers (width 512 to 1152, 577 and 4096
patches, with and without flash attention: 0 to 49 % above); sound and towers that take any size of
picture follow the source and were not run.
Source: llama.cpp b11434, tools/mtmd/clip.cpp (warm-up sizes, hyperparameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from smartproxy.gpus.cuda import FLASH_HEAD_LENGTHS
from smartproxy.model_file.header import Header

_F32 = 4
#: projectors that take pictures of any size are tried with 46 x 46 merged patches of 2 x 2
_ANY_SIZE = ("qwen2", "qwen3", "pixtral", "lightonocr", "kimivl", "glm4v", "dots", "paddleocr")
_ANY_SIZE_PATCHES = 4 * 46 * 46
#: positions of a Whisper encoder for its 30 seconds, before they are halved
_SOUND_POSITIONS = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    weights_bytes: int
    compute_bytes: int


def projector(header: Header, file_bytes: int, *, flash: bool) -> Projector:
    """Return what the projector of a file takes.

    flash: flash attention is on for the server; towers without a kernel for it run without.
    """
    graphs = (_vision_bytes(header, flash=flash), _sound_bytes(header, flash=flash))
    return Projector(weights_bytes=file_bytes, compute_bytes=max(graphs))


def _vision_bytes(header: Header, *, flash: bool) -> int:
    side, patch = _number(header, "vision.image_size"), _number(header, "vision.patch_size") or 14
    patches, gated = (side // patch) ** 2 + 1, False
    if _kind(header).startswith(_ANY_SIZE):
        patches, gated = max(patches, _ANY_SIZE_PATCHES), True
    picture = 3 * patches * patch * patch * _F32
    return picture + _tower_bytes(header, ("vision", patches), flash=flash, gated=gated)


def _sound_bytes(header: Header, *, flash: bool) -> int:
    return _tower_bytes(header, ("audio", _SOUND_POSITIONS), flash=flash, gated=False)


def _tower_bytes(header: Header, of: tuple[str, int], *, flash: bool, gated: bool) -> int:
    """Return the widest moment of a layer: feed-forward or attention, and what lives beside it."""
    kind, positions = of
    width = _number(header, f"{kind}.embedding_length")
    heads = _number(header, f"{kind}.attention.head_count")
    inner = _number(header, f"{kind}.feed_forward_length")
    if not width or not heads:
        return 0
    scores = 0 if flash and width // heads in FLASH_HEAD_LENGTHS else heads * positions
    feed_forward = inner * (2 if gated else 1) + 4 * width
    return _F32 * positions * max(feed_forward, 6 * width + scores)


def _kind(header: Header) -> str:
    keys = header.keys
    return str(keys.get("clip.projector_type") or keys.get("clip.vision.projector_type"))


def _number(header: Header, key: str) -> int:
    value = header.keys.get(f"clip.{key}")
    return value if isinstance(value, int) else 0
