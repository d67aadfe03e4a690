"""GGUF files on disk: which of them are models, which belong together, which are projectors.

Input: paths. Output: plain values and lines that say what was left out. Reads names, and of
scanned files the first few kilobytes; what a model needs is metadata's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from smartproxy.config.values import check_model_name
from smartproxy.model_file.kind import GgufKind, gguf_kind
from smartproxy.model_file.parts import PART, parts_of

#: what tells two files of one model apart: quantization, float type, part of a name
_FILE_TYPE = re.compile(
    r"(?<![a-z0-9])(ud|imat|i1|mmproj|(i?q|tq)\d+(_[a-z0-9]+)*|mxfp4(_moe)?|b?f16|f32)(?![a-z0-9])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """One model under models_dir."""

    #: path below the folder without .gguf and without the part's number
    id: str
    #: all its files that should be there, the first one first
    parts: tuple[Path, ...]
    mmproj: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    #: by id, sorted
    models: tuple[FoundModel, ...]
    warnings: tuple[str, ...]


def scan(folder: Path) -> Scan:
    """Return the models under a folder, links followed, hidden files and folders left out."""
    models: list[FoundModel] = []
    warnings: list[str] = []
    for files in _folders(folder, warnings):
        _scan_files(folder, files, models, warnings)
    return Scan(models=tuple(sorted(models, key=lambda model: model.id)), warnings=tuple(warnings))


def files_problem(parts: Iterable[Path]) -> str | None:
    """Return why a model's files can't be loaded as far as the disk can tell, or None."""
    for part in parts:
        if part.is_dir():
            return f"{part} is a folder, not a GGUF file"
        if not part.exists():
            return f"file not found: {part}"
        if not os.access(part, os.R_OK):
            return f"file can't be read: {part}"
    return None


def find_variant(folder: Path, variant: str) -> tuple[Path, ...] | None:
    """Return the files of one variant of a repo kept in a folder, or None.

    variant: a quantization, matched at the end of the name in either case, or a file name.
    """
    for found in scan(folder).models if folder.is_dir() else ():
        first, wanted = found.parts[0].name.casefold(), variant.casefold()
        if first == wanted or re.search(rf"(^|[^a-z0-9]){re.escape(wanted)}$", found.id.casefold()):
            return found.parts
    return None


def _folders(folder: Path, warnings: list[str]) -> Iterator[list[Path]]:
    """Yield the .gguf files of every folder, each real folder once (links may form a circle)."""
    visited: set[str] = set()

    def unreadable(error: OSError) -> None:
        warnings.append(f"models_dir: {error.filename} can't be read: {error.strerror}")

    for where, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(where)
        folders[:] = [] if real in visited else sorted(f for f in folders if f[0] != ".")
        if real in visited:
            continue
        visited.add(real)
        files = (Path(where, name) for name in sorted(names) if name[0] != ".")
        yield [file for file in files if file.suffix.lower() == ".gguf" and file.is_file()]


def _scan_files(
    folder: Path, files: list[Path], models: list[FoundModel], warnings: list[str]
) -> None:
    """Sort one folder's files into models with their projectors."""
    kinds = {file: gguf_kind(file) for file in files}
    projectors = [file for file, kind in kinds.items() if kind is GgufKind.PROJECTOR]
    wholes = {parts_of(file): None for file, kind in kinds.items() if kind is GgufKind.MODEL}
    same = len({_base(parts[0]) for parts in wholes}) == 1
    for parts in wholes:
        model_id = _id(folder, parts[0])
        try:
            check_model_name(model_id)
        except ValueError as error:
            warnings.append(f"models_dir: {str(parts[0])!r} is left out: its id {error}")
            continue
        mine = [p for p in projectors if same or _base(p) == _base(parts[0])]
        if len(mine) > 1:
            warnings.append(
                f'model "{model_id}": {len(mine)} projectors lie beside it; to use one, list '
                "the model and name it as mmproj"
            )
        models.append(
            FoundModel(id=model_id, parts=parts, mmproj=mine[0] if len(mine) == 1 else None)
        )


def _id(folder: Path, first: Path) -> str:
    return first.relative_to(folder).with_name(_stem(first)).as_posix()


def _stem(path: Path) -> str:
    match = PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


def _base(path: Path) -> str:
    """Return the name without what tells files of one model apart."""
    words = _FILE_TYPE.sub(" ", _stem(path).casefold().replace(".", "-"))
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")
