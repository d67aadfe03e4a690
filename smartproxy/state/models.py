"""The catalogue with what is known of each model, and the headers of its files, read once.

Only the manager writes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Self

from smartproxy.state.sql import columns, marks
from smartproxy.state.store import Row, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A model as listed. What is None is not known, or not said."""

    id: str
    path: str | None = None
    #: why it can't be loaded, in words
    problem: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    quantization: str | None = None
    file_bytes: int | None = None
    #: tokens
    trained_context: int | None = None
    context_size: int | None = None
    #: of the whole model on one GPU
    estimated_bytes: int | None = None
    host_estimated_bytes: int | None = None
    confident: bool | None = None
    #: Unix seconds
    updated_at: float = 0.0

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `models` says."""
        sure = row["confident"]
        values = {**row, "confident": None if sure is None else bool(sure)}
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """A file's header, and what the file was like when it was read."""

    path: str
    size_bytes: int
    mtime_ns: int
    #: as model_file/metadata.py writes it
    metadata: str
    #: Unix seconds
    read_at: float

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `files` says."""
        return cls(**row)


def models(store: Store) -> dict[str, ModelRow]:
    """Return what is known of each model, by id."""
    rows = store.read(f"SELECT {columns(ModelRow)} FROM models")
    return {row["id"]: ModelRow.from_row(row) for row in rows}


def write_model(store: Store, model: ModelRow) -> None:
    """Write what is known of one model in place of what was."""
    with store.write() as connection:
        connection.execute(
            f"INSERT OR REPLACE INTO models ({columns(ModelRow)}) VALUES ({marks(ModelRow)})",
            asdict(model),
        )


def keep_models(store: Store, ids: Collection[str]) -> None:
    """Delete all models but these."""
    places = ",".join("?" * len(ids))
    with store.write() as connection:
        connection.execute(f"DELETE FROM models WHERE id NOT IN ({places})", list(ids))


def file_of(store: Store, path: str) -> FileRow | None:
    """Return what was read of a file; None if it never was."""
    row = store.one(f"SELECT {columns(FileRow)} FROM files WHERE path = ?", (path,))
    return FileRow.from_row(row) if row is not None else None


def write_file(store: Store, file: FileRow) -> None:
    """Write what was read of a file in place of what was."""
    with store.write() as connection:
        connection.execute(
            f"INSERT OR REPLACE INTO files ({columns(FileRow)}) VALUES ({marks(FileRow)})",
            asdict(file),
        )
