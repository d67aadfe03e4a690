"""What we read of the real model's file, beside GGUF's own reader and its card."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from smartproxy.catalog.catalog import build_catalog
from smartproxy.config.settings import Settings
from smartproxy.model_file.header import Counted, parse_header
from smartproxy.model_file.metadata import read_metadata
from tests.support.measured_cases import REAL_MODEL


def test_header_says_what_ggufs_own_reader_says_of_the_real_model() -> None:
    ours, theirs = parse_header(REAL_MODEL.read_bytes()), GGUFReader(REAL_MODEL)
    for key, value in ours.keys.items():
        field = theirs.fields[key]
        if isinstance(value, Counted):
            assert value.count == len(field.data)
        else:
            assert value == pytest.approx(field.contents())
    assert len(ours.keys) == len([key for key in theirs.fields if not key.startswith("GGUF.")])
    assert [
        (info.name, info.dims, info.type, ours.data_offset + info.offset) for info in ours.tensors
    ] == [
        (t.name, tuple(int(d) for d in t.shape), int(t.tensor_type), t.data_offset)
        for t in theirs.tensors
    ]


def test_real_model_is_what_its_card_says() -> None:
    model = read_metadata(REAL_MODEL)
    assert (model.architecture, model.parameters, model.quantization) == (
        "llama",
        134515008,
        "Q4_1",
    )
    assert (model.layer_count, model.trained_context, model.vocabulary_size) == (30, 8192, 49152)
    assert model.unknown is None
    assert model.file_bytes == REAL_MODEL.stat().st_size


def test_real_model_is_recognised_as_one(tmp_path: Path) -> None:
    (tmp_path / "smol.gguf").symlink_to(REAL_MODEL.resolve())
    assert list(build_catalog(Settings(models_dir=tmp_path)).models) == ["smol"]
