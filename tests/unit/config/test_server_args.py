"""What a model's `args` mean for its memory: read, left alone, or marked as beyond the rules."""

from __future__ import annotations

import pytest

from smartproxy.config.server_args import read_args
from smartproxy.memory.types import FlashAttention


def test_settings_that_the_estimate_follows_are_taken_out() -> None:
    said = ["-t", "4", "-b", "1024", "--ubatch-size", "256", "--swa_full", "-fa", "off", "-nkvo"]
    read = read_args(said)
    assert (read.batch, read.ubatch) == (1024, 256)
    assert read.flash_attn is FlashAttention.OFF
    assert read.swa_full
    assert not read.kv_offload
    assert read.rest == ("-t", "4")


def test_draft_and_projector_settings_are_taken_out() -> None:
    read = read_args(["-ctkd", "q8_0", "--spec-draft-type-v", "q4_0", "--no-mmproj-offload"])
    assert (read.cache_type_k_draft, read.cache_type_v_draft) == ("q8_0", "q4_0")
    assert not read.projector_offload
    assert read.projector
    assert not read_args(["--no-mmproj"]).projector
    assert read.rest == ()


def test_the_last_of_two_values_counts_as_for_the_server() -> None:
    read = read_args(["-ub", "128", "-nkvo", "-ub", "64", "-kvo"])
    assert read.ubatch == 64
    assert read.kv_offload


@pytest.mark.parametrize(
    "said", [["-ub", "much"], ["-fa", "perhaps"], ["-ctkd", "f12"], ["-b"], ["-ub", "0"]]
)
def test_what_the_server_will_refuse_is_left_for_it_to_say(said: list[str]) -> None:
    assert read_args(said).rest == tuple(said)


@pytest.mark.parametrize(
    "said",
    [
        ["-ot", "exps=CPU"],
        ["--override-tensor", "exps=CPU"],
        ["--override_kv", "llama.context_length=int:1"],
        ["--rpc", "127.0.0.1:1"],
        ["--spec-type", "draft-mtp"],
        ["-ncmoed", "3"],
    ],
)
def test_what_no_rule_follows_is_named_and_passed_on(said: list[str]) -> None:
    read = read_args(said)
    assert read.unmodelled
    assert read.rest == tuple(said)


def test_kinds_of_speculation_that_load_nothing_are_followed() -> None:
    read = read_args(["--spec-type", "draft-simple,ngram-mod", "--spec-draft-n-max", "5"])
    assert read.unmodelled == ()
    assert read.chooses_speculation
    assert read.draft_tokens == 5


def test_adapters_are_noticed_with_their_files() -> None:
    read = read_args(["--lora", "a.gguf,b.gguf", "--lora-scaled", "c:d.gguf:0.5"])
    assert read.adapters == ("a.gguf", "b.gguf", "c:d.gguf")
    assert read.rest == ("--lora", "a.gguf,b.gguf", "--lora-scaled", "c:d.gguf:0.5")


def test_ranking_is_noticed() -> None:
    assert read_args(["--reranking"]).ranks
    assert read_args(["--reranking"]).rest == ("--reranking",)
