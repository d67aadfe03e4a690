"""Names -> models: what is listed, what lies under models_dir, what a name means."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from smartproxy.catalog.catalog import Catalog, build_catalog
from smartproxy.config.load import load_settings
from smartproxy.errors import ConfigError, ModelNotFound
from smartproxy.planner.types import Strategy
from smartproxy.types import GIB


def catalog(tmp_path: Path, **keys: Any) -> Catalog:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    return build_catalog(load_settings(path, environ={}))


def scanned(tmp_path: Path, *names: str, **keys: Any) -> Catalog:
    for name in names:
        write(tmp_path / "models" / name)
    return catalog(tmp_path, models_dir="models", **keys)


def write(path: Path, **texts: str) -> Path:
    """Write a GGUF file that holds these text keys (`__` for `.`) and no tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(texts))
    for key, value in texts.items():
        head += _text(key.replace("__", ".")) + struct.pack("<I", 8) + _text(value)
    path.write_bytes(head)
    return path


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


# --- listed models --------------------------------------------------------------------------


def test_listed_model_has_the_general_settings_unless_it_has_its_own(tmp_path: Path) -> None:
    general = {
        "ctx_size": 1000,
        "parallel": 2,
        "gpu_layers": 7,
        "cache_type_bits": 8,
        "ttl": 60,
        "gpu_allocation_strategy": "packed",
        "partial_offload": True,
        "cpu_fallback": True,
        "load_timeout": 10,
    }
    own = {
        "ctx_size": "auto",
        "parallel": 3,
        "kv_unified": False,
        "gpu_layers": -1,
        "cache_type_v": "f16",
        "ttl": 0,
        "strategy": "distribute",
        "partial_offload": False,
        "cpu_fallback": False,
        "load_timeout": 20,
        "estimated_vram": 1.5,
        "cpu": True,
    }
    models = {"plain": {"path": "a.gguf"}, "own": {"path": "b.gguf", **own}}
    found = catalog(tmp_path, **general, models=models).models
    assert list(found) == ["plain", "own"]
    plain, mine = found["plain"], found["own"]
    assert (plain.context_size, mine.context_size) == (1000, None)
    assert (plain.parallel, mine.parallel) == (2, 3)
    assert (plain.kv_unified, mine.kv_unified) == (True, False)
    assert (plain.gpu_layers, mine.gpu_layers) == (7, None)
    assert (plain.cache_type_k, plain.cache_type_v) == ("q8_0", "q8_0")
    assert (mine.cache_type_k, mine.cache_type_v) == ("q8_0", "f16")
    assert (plain.ttl_s, mine.ttl_s) == (60, None)
    assert (plain.strategy, mine.strategy) == (Strategy.PACKED, Strategy.DISTRIBUTE)
    assert (plain.partial_offload, mine.partial_offload) == (True, False)
    assert (plain.cpu_fallback, mine.cpu_fallback) == (True, False)
    assert (plain.load_timeout_s, mine.load_timeout_s) == (10, 20)
    assert (plain.estimated_vram_bytes, mine.estimated_vram_bytes) == (None, 3 * GIB // 2)
    assert (plain.force_cpu, mine.force_cpu) == (False, True)


def test_defaults_are_those_of_the_spec(tmp_path: Path) -> None:
    spec = catalog(tmp_path, models={"a": {"path": "a.gguf"}}).models["a"]
    assert (spec.context_size, spec.parallel, spec.kv_unified) == (8192, 4, True)
    assert (spec.gpu_layers, spec.cache_type_k, spec.cache_type_v) == (None, "f16", "f16")
    assert (spec.ttl_s, spec.max_gpus, spec.gpus) == (None, None, None)
    assert (spec.partial_offload, spec.cpu_fallback) == (False, False)


@pytest.mark.parametrize(
    ("general", "own", "expected"),
    [
        ({"cache_type_bits": 4}, {}, "q4_0"),
        ({"cache_type_bits": 4, "cache_type_k": "bf16"}, {}, "bf16"),
        ({"cache_type_k": "bf16"}, {"cache_type_bits": 8}, "q8_0"),
        ({"cache_type_k": "bf16"}, {"cache_type_bits": 8, "cache_type_k": "q5_1"}, "q5_1"),
    ],
)
def test_nearer_cache_setting_wins_and_a_named_type_wins_over_bits(
    tmp_path: Path, general: dict[str, Any], own: dict[str, Any], expected: str
) -> None:
    found = catalog(tmp_path, **general, models={"a": {"path": "a.gguf", **own}})
    assert found.models["a"].cache_type_k == expected


def test_missing_file_is_the_models_problem_and_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "there.gguf")
    found = catalog(tmp_path, models={"a": {"path": "gone.gguf"}, "b": {"path": "there.gguf"}})
    gone = f"file not found: {tmp_path / 'gone.gguf'}"
    assert found.models["a"].problem == gone
    assert found.models["b"].problem is None
    assert found.warnings == (f'model "a": {gone}',)


@pytest.mark.parametrize("key", ["mmproj", "draft_model"])
def test_missing_companion_file_is_the_models_problem(tmp_path: Path, key: str) -> None:
    write(tmp_path / "a.gguf")
    found = catalog(tmp_path, models={"a": {"path": "a.gguf", key: "gone.gguf"}})
    assert found.models["a"].problem == f"file not found: {tmp_path / 'gone.gguf'}"


def test_folder_as_path_is_the_models_problem(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    problem = catalog(tmp_path, models={"a": {"path": "a.gguf"}}).models["a"].problem
    assert problem == f"{tmp_path / 'a.gguf'} is a folder, not a GGUF file"


@pytest.mark.parametrize("named", [1, 2])
def test_any_part_names_the_whole_model(tmp_path: Path, named: int) -> None:
    parts = tuple(write(tmp_path / f"m-0000{n}-of-00003.gguf") for n in (1, 2, 3))
    spec = catalog(tmp_path, models={"m": {"path": parts[named - 1].name}}).models["m"]
    assert (spec.path, spec.parts, spec.problem) == (parts[0], parts, None)


def test_missing_part_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00002.gguf")
    spec = catalog(tmp_path, models={"m": {"path": "m-00001-of-00002.gguf"}}).models["m"]
    assert spec.problem == f"file not found: {tmp_path / 'm-00002-of-00002.gguf'}"


def test_no_models_at_all_is_a_warning(tmp_path: Path) -> None:
    assert "there are no models" in catalog(tmp_path).warnings[0]


# --- repos ----------------------------------------------------------------------------------


def test_repo_without_a_file_says_that_a_path_is_needed(tmp_path: Path) -> None:
    spec = catalog(tmp_path, models={"q": {"repo": "user/name"}}).models["q"]
    assert spec.problem == "downloads are not available yet; give a path"
    assert (spec.path, spec.parts) == (None, ())


@pytest.mark.parametrize(
    ("variant", "file"),
    [
        (None, "name-Q4_K_M.gguf"),
        ("Q4_K_M", "name-Q4_K_M.gguf"),
        ("q8_0", "name.Q8_0.gguf"),
        ("name.Q8_0.gguf", "name.Q8_0.gguf"),
        ("F16", "F16/name-F16-00001-of-00002.gguf"),
    ],
)
def test_repo_is_found_under_models_dir(tmp_path: Path, variant: str | None, file: str) -> None:
    home = tmp_path / "models" / "user" / "name"
    for name in ("name-Q4_K_M.gguf", "name.Q8_0.gguf", "name-IQ4_K_M.gguf", "mmproj-F16.gguf"):
        write(home / name)
    for number in (1, 2):
        write(home / f"F16/name-F16-0000{number}-of-00002.gguf")
    own = {"repo": "user/name"} | ({} if variant is None else {"variant": variant})
    spec = catalog(tmp_path, models_dir="models", models={"q": own}).models["q"]
    assert (spec.path, spec.problem) == (home / file, None)


@pytest.mark.parametrize(
    "name", ["q", "user/name", "user/name:Q4_K_M", "user/name:q4_k_m", " q ", "other"]
)
def test_model_answers_to_id_alias_and_repo_names(tmp_path: Path, name: str) -> None:
    models = {
        "q": {"path": "a.gguf", "repo": "user/name", "aliases": ["other"]},
        "q8": {"path": "b.gguf", "repo": "user/name", "variant": "Q8_0"},
    }
    found = catalog(tmp_path, models=models)
    assert found.resolve(name).id == "q"
    assert found.resolve("user/name:Q8_0").id == "q8"


def test_of_two_models_of_one_variant_the_first_has_the_repos_name(tmp_path: Path) -> None:
    models = {
        "long": {"path": "a.gguf", "repo": "user/name", "ctx_size": 9000},
        "short": {"path": "a.gguf", "repo": "user/name"},
    }
    assert catalog(tmp_path, models=models).resolve("user/name").id == "long"


# --- names ----------------------------------------------------------------------------------


def test_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    models = {"Llama-7B": {"path": "a.gguf"}, "qwen": {"path": "b.gguf", "repo": "user/qwen"}}
    found = catalog(tmp_path, models=models)
    with pytest.raises(ModelNotFound) as caught:
        found.resolve("llama7b")
    assert str(caught.value) == 'model "llama7b" not found; nearest: "Llama-7B"'
    with pytest.raises(ModelNotFound, match='nearest: "user/qwen:Q4_K_M"'):
        found.resolve("user/qwen:Q5_K_M")
    with pytest.raises(ModelNotFound, match="GET /v1/models lists"):
        found.resolve("zzzz")


def test_overlong_name_is_shortened_in_the_answer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalog(tmp_path, models={"a": {"path": "a.gguf"}}).resolve("x" * 1_000_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("a/props", ("a", "props")),
        ("a/b/c/props", ("a/b/c", "props")),
        ("a/b/props/x", ("a", "b/props/x")),
        ("a/b/c", ("a/b/c", "")),
        ("a/b/c/", ("a/b/c", "")),
        ("short/v1/x?y", ("a/b/c", "v1/x?y")),
        ("user/name:Q4_K_M/slots", ("a", "slots")),
        ("user/name/slots", ("a", "slots")),
        ("ab/props", None),
        ("", None),
    ],
)
def test_longest_known_name_splits_a_path(
    tmp_path: Path, rest: str, expected: tuple[str, str] | None
) -> None:
    models = {
        "a": {"path": "a.gguf", "repo": "user/name"},
        "a/b/c": {"path": "b.gguf", "aliases": ["short"]},
    }
    split = catalog(tmp_path, models=models).split_path(rest)
    assert (None if split is None else (split[0].id, split[1])) == expected


def test_default_model_may_be_an_alias(tmp_path: Path) -> None:
    models = {"a": {"path": "a.gguf", "aliases": ["b"]}}
    assert catalog(tmp_path, models=models).default is None
    assert catalog(tmp_path, models=models, default_model="b").default == "a"


def test_unknown_default_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='default_model: model "aa" not found; nearest: "a1"'):
        catalog(tmp_path, models={"a1": {"path": "a.gguf"}}, default_model="aa")


# --- models_dir -----------------------------------------------------------------------------


def test_every_gguf_under_models_dir_is_a_model(tmp_path: Path) -> None:
    found = scanned(tmp_path, "b.gguf", "deep/er/a.GGUF", "c.txt", ".hidden.gguf", ".x/y.gguf")
    assert list(found.models) == ["b", "deep/er/a"]
    assert found.models["deep/er/a"].path == tmp_path / "models/deep/er/a.GGUF"
    assert found.warnings == ()


def test_file_name_alone_is_an_alias_where_it_is_unambiguous(tmp_path: Path) -> None:
    found = scanned(tmp_path, "x/one.gguf", "x/two.gguf", "y/two.gguf", "z/top.gguf", "top.gguf")
    assert found.resolve("one").id == "x/one"
    assert found.resolve("top").id == "top"
    with pytest.raises(ModelNotFound):
        found.resolve("two")


def test_several_files_are_one_model(tmp_path: Path) -> None:
    found = scanned(tmp_path, "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert list(found.models) == ["m"]
    assert [part.name for part in found.models["m"].parts] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]


@pytest.mark.parametrize("there", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
def test_model_with_a_part_missing_is_listed_with_its_problem(tmp_path: Path, there: str) -> None:
    found = scanned(tmp_path, there)
    assert "file not found" in (found.models["m"].problem or "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # the only projector beside variants of one model
        (["q-Q4_K_M.gguf", "q-Q8_0.gguf", "mmproj-model-f16.gguf"], "mmproj-model-f16.gguf"),
        # by name, among other models
        (["q-Q4_K_M.gguf", "other.gguf", "mmproj-q-f16.gguf"], "mmproj-q-f16.gguf"),
        (["q-Q4_K_M.gguf", "other.gguf", "q.mmproj-Q8_0.gguf"], "q.mmproj-Q8_0.gguf"),
        # whose it is can't be told
        (["q-Q4_K_M.gguf", "other.gguf", "mmproj-model-f16.gguf"], None),
        # which one is wanted can't be told
        (["q-Q4_K_M.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"], None),
        # in another folder
        (["q-Q4_K_M.gguf", "x/mmproj-F16.gguf"], None),
    ],
)
def test_projector_goes_with_its_model_where_that_is_unambiguous(
    tmp_path: Path, files: list[str], expected: str | None
) -> None:
    found = scanned(tmp_path, *files)
    assert not [model_id for model_id in found.models if "mmproj" in model_id]
    projector = found.models["q-Q4_K_M"].mmproj
    assert (projector and projector.name) == expected


def test_choice_of_projectors_is_said(tmp_path: Path) -> None:
    found = scanned(tmp_path, "q-Q4_K_M.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf")
    assert found.warnings == (
        'model "q-Q4_K_M": 2 projectors lie beside it; to use one, list the model and name it '
        "as mmproj",
    )


def test_header_tells_projectors_and_adapters_whatever_they_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write(folder / "model.gguf", general__architecture="llama", general__type="model")
    eyes = write(folder / "eyes.gguf", general__architecture="clip")
    write(folder / "lora.gguf", general__architecture="llama", general__type="adapter")
    write(folder / "matrix.gguf", general__type="imatrix")
    found = catalog(tmp_path, models_dir="models")
    assert list(found.models) == ["model"]
    assert found.models["model"].mmproj == eyes


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 200, b"no such thing"])
def test_broken_file_is_listed_so_that_its_own_error_can_be_seen(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(content)
    assert list(catalog(tmp_path, models_dir="models").models) == ["broken"]


def test_listed_model_wins_over_a_scanned_one_of_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "models" / "x" / "file.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "models" / "x" / "file.gguf")
    found = catalog(
        tmp_path, models_dir="models", models={"mine": {"path": "link.gguf", "ctx_size": 5}}
    )
    assert list(found.models) == ["mine"]
    assert found.warnings == ()


def test_listed_name_wins_over_a_scanned_one_and_this_is_said(tmp_path: Path) -> None:
    write(tmp_path / "mine.gguf")
    found = scanned(
        tmp_path, "a.gguf", "b.gguf", models={"a": {"path": "mine.gguf", "aliases": ["b"]}}
    )
    assert {spec.path for spec in found.models.values()} == {tmp_path / "mine.gguf"}
    hidden = [warning for warning in found.warnings if "is hidden by the listed" in warning]
    assert len(hidden) == 2


@pytest.mark.parametrize("name", ["a,b.gguf", "-m.gguf", "a\nb.gguf", os.fsdecode(b"\xff.gguf")])
def test_file_whose_name_no_request_could_carry_is_left_out_and_said(
    tmp_path: Path, name: str
) -> None:
    found = scanned(tmp_path, name, "fine.gguf")
    assert list(found.models) == ["fine"]
    (warning,) = found.warnings
    assert "is left out" in warning
    assert warning.isprintable()


def test_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    (tmp_path / "models" / "x" / "back").symlink_to(tmp_path / "models")
    (tmp_path / "models" / "dangling.gguf").symlink_to(tmp_path / "nowhere")
    assert list(scanned(tmp_path, "x/a.gguf").models) == ["x/a"]
