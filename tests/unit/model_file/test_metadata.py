from __future__ import annotations

import struct
from contextlib import suppress
from math import prod
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from smartproxy.errors import MetadataError
from smartproxy.model_file import header as gguf_header
from smartproxy.model_file import metadata
from smartproxy.model_file.header import Counted, parse_header
from smartproxy.model_file.metadata import read_metadata
from tests.support import gguf_files, gguf_models, gguf_shapes
from tests.support.examples import examples
from tests.support.gguf_files import Tensor, header, key_value, string, tensor_info

TINY = gguf_shapes.Body(
    width=256, layers=4, heads=4, kv_heads=2, head=64, inner=512, vocabulary=1000, trained=4096
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return gguf_files.write(gguf_shapes.transformer("tiny.Q4_K_M", "llama", TINY), tmp_path)


def message_for(path: Path) -> str:
    with pytest.raises(MetadataError) as caught:
        read_metadata(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", list(gguf_models.MODELS))
def test_jumping_over_the_vocabulary_reads_the_same_as_walking_it(
    name: str, tmp_path: Path
) -> None:
    data = _start_of(gguf_files.write(gguf_models.MODELS[name](), tmp_path))
    assert parse_header(data) == parse_header(data, jump=False)


def test_a_vocabulary_that_looks_like_keys_is_walked(tmp_path: Path) -> None:
    tokens = [string("tokenizer.ggml.model\0\0\0\0\0\0\0tokenizer.x" * 2)] * 100
    entries = [
        (1, key_value("general.architecture", "llama")),
        (1, _string_array("tokenizer.ggml.tokens", tokens)),
        (1, key_value("llama.block_count", 3)),
    ]
    path = tmp_path / "odd.gguf"
    gguf_files.write_file(path, entries, [Tensor(name="a", dims=(32,), type=T.F32)])
    parsed = parse_header(path.read_bytes())
    assert parsed.keys["llama.block_count"] == 3
    assert parsed.keys["tokenizer.ggml.tokens"] == Counted(100)


@pytest.mark.parametrize("token", ["", "a", "abcd", "x" * 30, "x" * 300])
@pytest.mark.parametrize("what_follows", [True, False])
def test_tokens_of_any_length_are_jumped_over_or_walked(
    token: str, what_follows: bool, tmp_path: Path
) -> None:
    entries = [
        (1, key_value("general.architecture", "llama")),
        (1, key_value("llama.block_count", 3)),
        (1, _string_array("tokenizer.ggml.tokens", [string(token)] * 5000)),
        (1, _string_array("tokenizer.ggml.merges", [string(token)] * 3000)),
    ]
    if what_follows:
        entries.append((1, key_value("tokenizer.ggml.bos_token_id", 7)))
    tensors = [Tensor(name=name, dims=(32,), type=T.F32) for name in ("a", "token_embd.weight")]
    path = tmp_path / "odd.gguf"
    gguf_files.write_file(path, entries, tensors)
    data = path.read_bytes()
    parsed = parse_header(data)
    assert parsed == parse_header(data, jump=False)
    assert parsed.keys["tokenizer.ggml.merges"] == Counted(3000)
    assert [tensor.name for tensor in parsed.tensors] == ["a", "token_embd.weight"]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama31-8b.Q4_K_M", "Q4_K_M"),
        ("llama32-1b.Q8_0", "Q8_0"),
        ("gptoss-20b.MXFP4", "MXFP4"),
        ("bge-large.F16", "F16"),
        ("gemma3-12b.Q4_0", "Q4_0"),
        ("qwen3-14b.Q5_K_M", "Q5_K_M"),
    ],
)
def test_quantization_comes_from_the_tensors_not_from_the_name(
    name: str, quantization: str, tmp_path: Path
) -> None:
    path = gguf_files.write(gguf_models.MODELS[name](), tmp_path)
    if "-of-" not in path.name:
        path = path.rename(tmp_path / "nothing-said.gguf")
    assert read_metadata(path).quantization == quantization


def test_parts_are_followed_and_summed(tmp_path: Path) -> None:
    path = gguf_files.write(gguf_models.MODELS["llama33-70b.Q4_K_M"](), tmp_path)
    model = read_metadata(path)
    assert model.parameters == 70553706496
    assert len(model.files) == 3
    assert model.file_bytes == sum(Path(file).stat().st_size for file in model.files)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    shape = gguf_models.MODELS["llama33-70b.Q4_K_M"]()
    path = gguf_files.write(shape, tmp_path)
    missing = gguf_files.part_paths(shape, tmp_path)[2]
    missing.unlink()
    assert f"its part {missing.name} is missing" in message_for(path)


def test_a_later_part_asks_for_the_first(tmp_path: Path) -> None:
    shape = gguf_models.MODELS["llama33-70b.Q4_K_M"]()
    gguf_files.write(shape, tmp_path)
    assert "name the first part" in message_for(gguf_files.part_paths(shape, tmp_path)[1])


@pytest.mark.parametrize("name", ["llama31-8b.Q4_K_M", "gemma3-4b.Q4_K_M", "qwen3next-80b.Q4_K_M"])
def test_metadata_survives_the_cache(name: str, tmp_path: Path) -> None:
    model = read_metadata(gguf_files.write(gguf_models.MODELS[name](), tmp_path))
    assert metadata.from_json(metadata.to_json(model)) == model


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', "null"])
def test_a_cache_entry_of_another_version_is_an_error_not_a_crash(text: str) -> None:
    with pytest.raises(MetadataError, match="cached metadata"):
        metadata.from_json(text)


def test_a_projector_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    entries = [(1, key_value("general.architecture", "clip"))]
    gguf_files.write_file(path, entries, [Tensor(name="v.patch", dims=(32, 32), type=T.F16)])
    assert "a projector (mmproj), not a model" in message_for(path)


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    assert "No such file or directory" in message_for(tmp_path / "nowhere.gguf")
    assert "not a regular file" in message_for(tmp_path)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "the file is empty" in message_for(empty)
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\x03\x04" + b"x" * 100)
    assert "not a GGUF file" in message_for(foreign)


def test_a_file_cut_in_its_weights_is_incomplete(tiny: Path) -> None:
    with tiny.open("r+b") as file:
        file.truncate(tiny.stat().st_size - 100_000)
    assert "it is incomplete" in message_for(tiny)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(tensors=0, keys=0)[:10], "ends inside its header"),
        (header(tensors=0, keys=5), "ends inside its header"),
        (header(tensors=0, keys=0, version=1), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=1 << 60, keys=0), "tensors (at most"),
        (header(tensors=0, keys=1 << 60), "keys (at most"),
        (header(tensors=0, keys=1) + struct.pack("<Q", 1 << 62), "bytes long"),
        (header(tensors=0, keys=1) + string("a") + struct.pack("<I", 99), "unknown value type 99"),
        (
            header(tensors=0, keys=1)
            + string("a")
            + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.ARRAY, 2),
            "array of arrays",
        ),
        (
            header(tensors=0, keys=1)
            + string("a")
            + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 1 << 60),
            "elements (at most",
        ),
        (
            header(tensors=0, keys=1)
            + string("a")
            + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT64, 1 << 20),
            "past the end of the file",
        ),
        (header(tensors=1, keys=0) + string("t") + struct.pack("<I", 1 << 30), "dimensions"),
        (header(tensors=0, keys=0), "general.architecture is missing"),
    ],
)
def test_hostile_headers_are_refused_with_a_reason(
    data: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    assert reason in message_for(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.block_count", 100_000, "100000 layers"),
        ("llama.block_count", "many", "not a number"),
        ("llama.block_count", 2, "outside the model's 2 layers"),
        ("llama.attention.head_count_kv", [1, 2], "2 numbers for 4 layers"),
        ("llama.attention.head_count", -4, "not a number"),
        ("llama.embedding_length", 0, "embedding length is missing"),
        ("general.alignment", 0, "general.alignment is 0"),
    ],
)
def test_keys_that_make_no_sense_are_named(
    key: str, value: gguf_files.Value, reason: str, tmp_path: Path
) -> None:
    keys = {**gguf_shapes.common_keys(TINY), key.removeprefix("llama."): value}
    if value == -4:
        keys["attention.head_count"] = [-4] * 4
    shape = gguf_shapes.transformer("tiny.Q8_0", "llama", TINY)
    path = gguf_files.write(
        gguf_files.Shape(
            name="odd",
            architecture="llama",
            keys=keys,
            tensors=shape.tensors,
            vocabulary=10,
        ),
        tmp_path,
    )
    assert reason in message_for(path)


@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_a_model_never_a_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = gguf_files.write(gguf_shapes.transformer("tiny.Q4_K_M", "llama", TINY), folder)
    end = parse_header(path.read_bytes()).data_offset
    with path.open("r+b") as file:
        for _ in range(data.draw(st.integers(1, 4))):
            file.seek(data.draw(st.integers(0, end - 1)))
            file.write(data.draw(st.binary(min_size=1, max_size=8)))
        if data.draw(st.booleans()):
            file.truncate(data.draw(st.integers(0, end)))
    with suppress(MetadataError):
        read_metadata(path)


def test_a_tensor_type_from_the_future_is_sized_by_its_neighbours(tmp_path: Path) -> None:
    shape = gguf_shapes.transformer("tiny.Q8_0", "llama", TINY)
    path = gguf_files.write(shape, tmp_path)
    data = bytearray(path.read_bytes())
    entry = tensor_info(shape.tensors[3], 0)[:-8]  # without its offset
    at = bytes(data).find(entry)
    struct.pack_into("<I", data, at + len(entry) - 4, 250)
    path.write_bytes(data)
    model = read_metadata(path)
    assert model.unknown == "tensor type 250"
    assert model.parameters == sum(prod(tensor.dims) for tensor in shape.tensors)


def test_reading_touches_no_weights(tmp_path: Path) -> None:
    path = gguf_files.write(gguf_models.MODELS["llama33-70b.Q4_K_M"](), tmp_path)
    read_metadata(path)
    # a hole stays a hole: 42 GB of weights, a few MB on disk
    assert path.stat().st_blocks * 512 < 64 << 20


def test_ggufs_types_are_all_sized() -> None:
    assert set(gguf_header.SCALARS) == {
        int(kind) for kind in GGUFValueType if kind.name not in ("STRING", "ARRAY")
    }


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32 << 20)


def _string_array(key: str, items: list[bytes]) -> bytes:
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(items))
    return string(key) + head + b"".join(items)
