from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from smartproxy.commands.estimate import estimate_command
from smartproxy.planner.ledger import open_ledger
from tests.support import gguf_files, gguf_models
from tests.support.worlds import gpu, snapshot

PARTS = {
    "weights_bytes",
    "kv_cache_bytes",
    "recurrent_bytes",
    "compute_bytes",
    "overhead_bytes",
    "total_bytes",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = gguf_models.MODELS["llama32-1b.Q8_0"]()
    return gguf_files.write(shape, tmp_path_factory.mktemp("models"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(estimate_command, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_promised_shape(llama: Path) -> None:
    said = answer(llama, "--ctx-size", 8192)
    assert said["file"] == str(llama)
    assert (said["architecture"], said["parameters"]) == ("llama", 1235814400)
    assert (said["quantization"], said["context_size"]) == ("Q8_0", 8192)
    assert said["confident"] is True
    assert len(said["devices"]) == 1
    assert set(said["devices"][0]) == set(said["host"]) == PARTS
    device = said["devices"][0]
    assert device["total_bytes"] == sum(device[part] for part in PARTS - {"total_bytes"})
    assert said["total_bytes"] == device["total_bytes"]
    assert said["buffers_bytes"] == device["total_bytes"] - device["overhead_bytes"]
    assert device["overhead_bytes"] > 0


def test_several_files_are_a_list(llama: Path) -> None:
    assert [said["file"] for said in answer(llama, llama)] == [str(llama)] * 2


def test_what_is_left_out_is_the_servers_default(llama: Path) -> None:
    assert answer(llama)["context_size"] == 131072
    assert answer(llama, "--gpu-layers", -1) == answer(llama)
    assert answer(llama, "--parallel", 4, "--kv-unified") == answer(llama)
    assert answer(llama, "--parallel", 4) != answer(llama)
    assert answer(llama, "--flash-attn", "on") == answer(llama)


def test_options_change_the_numbers_they_should(llama: Path) -> None:
    plain = answer(llama, "--ctx-size", 8192)["devices"][0]
    quantized = answer(llama, "--ctx-size", 8192, "--cache-type-k", "q8_0")["devices"][0]
    assert quantized["kv_cache_bytes"] < plain["kv_cache_bytes"]
    off = answer(llama, "--ctx-size", 8192, "--flash-attn", "off")["devices"][0]
    assert off["compute_bytes"] > plain["compute_bytes"]
    batch = answer(llama, "--ctx-size", 8192, "--ubatch", 128)["devices"][0]
    assert batch["compute_bytes"] < plain["compute_bytes"]
    capped = answer(llama, "--ctx-size", 8192, "--batch", 128)["devices"][0]
    assert capped["compute_bytes"] == batch["compute_bytes"]
    host_cache = answer(llama, "--ctx-size", 8192, "--no-kv-offload")
    assert host_cache["devices"][0]["kv_cache_bytes"] == 0
    assert host_cache["host"]["kv_cache_bytes"] == plain["kv_cache_bytes"]
    embeddings = answer(llama, "--ctx-size", 8192, "--embeddings")["devices"][0]
    assert embeddings["compute_bytes"] > plain["compute_bytes"]


def test_devices_are_those_of_the_split(llama: Path) -> None:
    said = answer(llama, "--tensor-split", "3,1")
    assert len(said["devices"]) == 2
    assert said["devices"][0]["weights_bytes"] > said["devices"][1]["weights_bytes"]
    assert answer(llama, "--tensor-split", "3/1") == said


def test_bad_files_are_one_line_each_and_the_rest_is_answered(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03")
    result = run(broken, llama, tmp_path / "nowhere.gguf", "--json")
    assert result.exit_code == 1
    assert [said["file"] for said in json.loads(result.stdout)] == [str(llama)]
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert str(broken) in lines[0]
    assert "nowhere.gguf: No such file" in lines[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tensor-split", "3:1"),
        ("--tensor-split", "0,0"),
        ("--tensor-split", "nan,1"),
        ("--tensor-split", ",".join("1" * 17)),
        ("--cache-type-k", "q9"),
        ("--parallel", "0"),
        ("--ctx-size", "-1"),
        ("--cache-type-v", "q8_0", "--flash-attn", "off"),
    ],
)
def test_senseless_options_are_usage_errors(llama: Path, arguments: tuple[str, ...]) -> None:
    result = run(llama, *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_table_bars_and_matrix_are_readable(llama: Path) -> None:
    result = run(llama, "--bars", "--matrix", "--card-gb", "4", "--tensor-split", "1,1")
    assert result.exit_code == 0
    for word in ("GPU 0", "GPU 1", "host", "weights", "KV cache", "█", "does not fit 4 GB"):
        assert word in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("1310")]
    assert len(rows) == 1
    assert float(rows[0][1]) > float(rows[0][-1]) or "(no)" in rows[0]


def test_overhead_is_the_planners_for_a_card_of_that_size(llama: Path) -> None:
    for card_gb, size_bytes in ((8, 8 << 30), (16, 16 << 30), (24, 24 << 30), (80, 80 << 30)):
        said = answer(llama, "--card-gb", card_gb)
        world = snapshot([gpu(0, card_gb)])
        (planned,) = open_ledger(replace(world, overhead_bytes={})).overhead_bytes
        assert [device["overhead_bytes"] for device in said["devices"]] == [planned]
        assert said["card_bytes"] == size_bytes


def test_overhead_without_a_cards_size_is_the_most_of_any_and_the_output_says_so(
    llama: Path,
) -> None:
    said = answer(llama)
    (largest,) = answer(llama, "--card-gb", 192)["devices"]
    assert said["devices"] == [largest]
    assert said["card_bytes"] is None
    assert "Overhead: 620 MiB, as for the largest GPU. --card-gb" in run(llama).stdout
    assert "Overhead: 270 MiB, as for any GPU of 8 GB" in run(llama, "--card-gb", 8).stdout


def test_matrix_without_a_cards_size_marks_nothing(llama: Path) -> None:
    output = run(llama, "--matrix").stdout
    assert "GB on the fullest GPU\n" in output
    assert "(no)" not in output


def test_matrix_marks_what_does_not_fit(llama: Path) -> None:
    assert "(no)" in run(llama, "--matrix", "--card-gb", "2").stdout.split("fit 2 GB")[1]
    assert "(no)" not in run(llama, "--matrix", "--card-gb", "80").stdout.split("fit 80 GB")[1]
