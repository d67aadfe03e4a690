"""The files of one model: llama.cpp splits large ones by name."""

from __future__ import annotations

import re
from pathlib import Path

#: llama.cpp's names of the files of one model: llama_split_path in src/llama.cpp
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def parts_of(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that this file belongs to, the first first, there or not."""
    match = PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return (path,)
    return tuple(
        path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}{path.suffix}")
        for number in range(1, int(match["count"]) + 1)
    )
