from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartproxy.errors import UnknownCacheType
from smartproxy.memory.estimate import (
    Loaded,
    clamped_context,
    estimate,
    make_need,
    predictor,
    resolved_flash_attn,
)
from smartproxy.memory.kv_cache import CACHE_TYPES
from smartproxy.memory.layer_split import HOST, layer_devices
from smartproxy.memory.types import DeviceBytes, Estimate, EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.metadata import read_metadata
from smartproxy.model_file.types import ModelMetadata
from tests.support import gguf_files, gguf_models, gguf_shapes
from tests.support.examples import examples
from tests.support.measured_cases import Case, all_cases, metadata_of, to_mib

#: the server's log rounds each of a device's numbers to 0.01 MiB
ROUNDING_MIB = 0.02
ONE_GPU = Layout(tensor_split=(1.0,), gpu_layers=999, context_size=8192)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def llama_8b(folder: Path) -> ModelMetadata:
    return metadata_of("llama31-8b.Q4_K_M.gguf", folder)


def named(cases: tuple[Case, ...]) -> list[object]:
    return [pytest.param(case, id=f"{case.name}-{case.file}") for case in cases]


@pytest.mark.parametrize("case", named(all_cases()))
def test_total_is_close_to_what_the_server_took_and_never_under(case: Case, folder: Path) -> None:
    predicted = to_mib(case.predicted(folder).total_bytes)
    over = predicted - case.total_mib
    assert over >= -ROUNDING_MIB * len(case.devices_mib)
    if not case.is_full(folder):
        assert over <= max(0.10 * case.total_mib, 64)
    elif len(case.layout.tensor_split) > 1:
        assert over <= 0.04 * case.total_mib
    else:
        assert over <= 0.01 * case.total_mib


@pytest.mark.parametrize("case", named(all_cases()))
def test_weights_caches_and_states_are_exact_on_every_device(case: Case, folder: Path) -> None:
    for device, measured in zip(case.predicted(folder).devices, case.devices_mib, strict=True):
        assert to_mib(device.weights_bytes) == pytest.approx(measured["model"], abs=ROUNDING_MIB)
        cache, state = to_mib(device.kv_cache_bytes), to_mib(device.recurrent_bytes)
        assert cache == pytest.approx(measured.get("KV", 0), abs=ROUNDING_MIB)
        assert state == pytest.approx(measured.get("RS", 0), abs=ROUNDING_MIB)


@pytest.mark.parametrize("case", named(tuple(c for c in all_cases() if len(c.devices_mib) > 1)))
def test_no_single_device_gets_less_than_it_took(case: Case, folder: Path) -> None:
    for device, measured in zip(case.predicted(folder).devices, case.devices_mib, strict=True):
        assert to_mib(device.compute_bytes) >= measured["compute"] - ROUNDING_MIB


@pytest.mark.parametrize("case", named(all_cases()))
def test_host_numbers_are_close_and_never_under(case: Case, folder: Path) -> None:
    host = case.predicted(folder).host
    assert to_mib(host.weights_bytes) == pytest.approx(case.host_mib["model"], abs=0.02)
    assert to_mib(host.kv_cache_bytes) == pytest.approx(case.host_mib["kv"], abs=0.02)
    assert to_mib(host.recurrent_bytes) == pytest.approx(case.host_mib["rs"], abs=0.02)
    assert to_mib(host.compute_bytes) >= case.host_mib["compute"]
    assert to_mib(host.compute_bytes) <= 1.25 * case.host_mib["compute"] + 32


@st.composite
def settings_of(draw: st.DrawFn) -> EstimateOptions:
    parallel = draw(st.sampled_from([None, 1, 2, 3, 8]))
    return EstimateOptions(
        parallel=parallel,
        kv_unified=draw(st.sampled_from([None, True, False])) if parallel else None,
        ubatch=draw(st.sampled_from([64, 512, 2048])),
        flash_attn=draw(st.sampled_from(list(FlashAttention))),
    )


models = st.sampled_from(
    [f"{name}.gguf" for name in gguf_models.MODELS if gguf_models.MODELS[name]().parts == 1]
)
shares = st.sampled_from([(1.0,), (1.0, 1.0), (3.0, 1.0), (1.0, 2.0, 3.0)])


@settings(max_examples=examples(60), deadline=None)
@given(
    file=models, options=settings_of(), split=shares, contexts=st.tuples(*[st.integers(1, 99)] * 2)
)
def test_more_context_never_needs_less(
    folder: Path,
    file: str,
    options: EstimateOptions,
    split: tuple[float, ...],
    contexts: tuple[int, int],
) -> None:
    metadata = metadata_of(file, folder)
    small, large = (
        estimate(
            metadata, options, Layout(tensor_split=split, gpu_layers=999, context_size=n * 999)
        )
        for n in sorted(contexts)
    )
    for less, more in zip(small.devices, large.devices, strict=True):
        assert less.total_bytes <= more.total_bytes
    assert small.host.total_bytes <= large.host.total_bytes


@settings(max_examples=examples(60), deadline=None)
@given(file=models, options=settings_of(), layers=st.tuples(*[st.integers(0, 70)] * 2))
def test_more_layers_on_the_gpu_never_hold_fewer_weights_and_caches(
    folder: Path, file: str, options: EstimateOptions, layers: tuple[int, int]
) -> None:
    metadata = metadata_of(file, folder)
    fewer, more = (
        estimate(metadata, options, replace(ONE_GPU, gpu_layers=count)).devices[0]
        for count in sorted(layers)
    )
    assert fewer.weights_bytes <= more.weights_bytes
    assert fewer.kv_cache_bytes <= more.kv_cache_bytes
    assert fewer.recurrent_bytes <= more.recurrent_bytes


@settings(max_examples=examples(40), deadline=None)
@given(file=models, kinds=st.tuples(*[st.sampled_from(sorted(CACHE_TYPES))] * 2))
def test_a_wider_cache_type_never_needs_a_smaller_cache(
    folder: Path, file: str, kinds: tuple[str, str]
) -> None:
    metadata = metadata_of(file, folder)
    narrow, wide = sorted(kinds, key=lambda kind: CACHE_TYPES[kind][1] / CACHE_TYPES[kind][0])
    caches = [
        estimate(metadata, EstimateOptions(cache_type_k=kind, cache_type_v=kind), ONE_GPU)
        for kind in (narrow, wide)
    ]
    assert caches[0].devices[0].kv_cache_bytes <= caches[1].devices[0].kv_cache_bytes


def test_the_cpu_alone_puts_everything_on_the_host(llama_8b: ModelMetadata) -> None:
    layout = Layout(tensor_split=(), gpu_layers=0, context_size=8192)
    predicted = estimate(llama_8b, EstimateOptions(), layout)
    assert predicted.devices == ()
    assert predicted.total_bytes == 0
    assert predicted.host.weights_bytes >= sum(layer.weights_bytes for layer in llama_8b.layers)
    # 8192 cells x 32 layers x (K + V) x 8 heads x 128 x 2 bytes
    assert predicted.host.kv_cache_bytes == 8192 * 32 * 2 * 8 * 128 * 2


def test_no_layers_on_a_visible_gpu_still_take_its_memory(llama_8b: ModelMetadata) -> None:
    predicted = estimate(llama_8b, EstimateOptions(), replace(ONE_GPU, gpu_layers=0))
    assert predicted.devices[0].weights_bytes == 0
    assert predicted.devices[0].compute_bytes > 0


def test_slots_left_out_share_one_cache_and_explicit_ones_do_not(llama_8b: ModelMetadata) -> None:
    left_out = estimate(llama_8b, EstimateOptions(), ONE_GPU).devices[0]
    explicit = estimate(llama_8b, EstimateOptions(parallel=4), ONE_GPU).devices[0]
    unified = estimate(llama_8b, EstimateOptions(parallel=4, kv_unified=True), ONE_GPU).devices[0]
    assert left_out == unified
    assert left_out.kv_cache_bytes == explicit.kv_cache_bytes
    assert left_out.compute_bytes > explicit.compute_bytes  # its mask spans all cells


def test_more_slots_than_tokens_still_get_the_smallest_cache(llama_8b: ModelMetadata) -> None:
    layout = replace(ONE_GPU, context_size=16)
    device = estimate(llama_8b, EstimateOptions(parallel=64), layout).devices[0]
    assert device.kv_cache_bytes == 64 * 256 * 32 * 2 * 8 * 128 * 2


def test_an_unknown_cache_type_is_refused_by_name(llama_8b: ModelMetadata) -> None:
    with pytest.raises(UnknownCacheType, match="'q9_9' is not one of f32, f16"):
        estimate(llama_8b, EstimateOptions(cache_type_k="q9_9"), ONE_GPU)


def test_context_is_clamped_to_the_trained_one(llama_8b: ModelMetadata) -> None:
    assert clamped_context(llama_8b, 4096) == 4096
    assert clamped_context(llama_8b, 10**9) == 131072
    assert clamped_context(llama_8b, 0) == 131072
    assert clamped_context(replace(llama_8b, trained_context=0), 0) > 0


def test_flash_attention_is_off_without_a_kernel_for_the_head(llama_8b: ModelMetadata) -> None:
    odd = replace(llama_8b, key_length=32, value_length=32)
    assert resolved_flash_attn(llama_8b, EstimateOptions())
    assert not resolved_flash_attn(odd, EstimateOptions())
    assert resolved_flash_attn(odd, EstimateOptions(cache_type_v="q8_0"))
    assert not resolved_flash_attn(llama_8b, EstimateOptions(flash_attn=FlashAttention.OFF))


def test_an_unknown_architecture_is_charged_more_and_marked(folder: Path) -> None:
    body = gguf_models.LLAMA_1B
    known, unknown = (
        read_metadata(gguf_files.write(gguf_shapes.transformer(f"{name}.Q8_0", name, body), folder))
        for name in ("llama", "brandnew")
    )
    sure, unsure = (estimate(m, EstimateOptions(), ONE_GPU) for m in (known, unknown))
    assert sure.confident
    assert not unsure.confident
    assert unsure.total_bytes > sure.total_bytes


def test_a_projector_and_a_draft_model_come_on_top(llama_8b: ModelMetadata) -> None:
    draft = Estimate(
        layout=ONE_GPU,
        devices=(DeviceBytes(weights_bytes=5),),
        host=DeviceBytes(weights_bytes=7),
    )
    plain = estimate(llama_8b, EstimateOptions(), ONE_GPU)
    both = estimate(llama_8b, EstimateOptions(projector_bytes=100, draft=draft), ONE_GPU)
    assert both.total_bytes == plain.total_bytes + 105
    assert both.host.total_bytes == plain.host.total_bytes + 7


def test_need_corrects_estimates_by_what_was_measured(llama_8b: ModelMetadata) -> None:
    measured = DeviceBytes(weights_bytes=1)
    need = make_need(
        Loaded(metadata=llama_8b, options=EstimateOptions()),
        context_size=10**9,
        correct=lambda predicted: replace(predicted, devices=(measured,)),
    )
    assert need.layer_count == 33
    assert need.moe_layer_count == 0
    assert need.context_size == need.max_context_size == 131072
    assert need.estimate(ONE_GPU).devices == (measured,)


def test_all_experts_can_stay_on_the_host_where_the_first_layers_have_none(folder: Path) -> None:
    moe = metadata_of("deepseek2-lite.Q4_K_M.gguf", folder)
    need = make_need(Loaded(metadata=moe, options=EstimateOptions()), context_size=4096)
    layout = replace(ONE_GPU, context_size=4096, cpu_moe_layers=need.moe_layer_count)
    experts = sum(layer.expert_bytes for layer in moe.layers)
    everything = sum(layer.weights_bytes for layer in moe.layers) + moe.output.weights_bytes
    assert not moe.layers[0].expert_bytes
    assert need.estimate(layout).devices[0].weights_bytes == everything - experts


def test_a_draft_model_lies_over_the_same_devices(llama_8b: ModelMetadata, folder: Path) -> None:
    small = metadata_of("llama32-1b.Q8_0.gguf", folder)
    loaded = Loaded(metadata=llama_8b, options=EstimateOptions(parallel=1), draft=small)
    layout = Layout(tensor_split=(1.0, 1.0), gpu_layers=33, context_size=4096)
    plain = estimate(llama_8b, EstimateOptions(parallel=1), layout)
    alone = estimate(small, EstimateOptions(), replace(layout, gpu_layers=17))
    for both, own, drafts in zip(
        predictor(loaded)(layout).devices, plain.devices, alone.devices, strict=True
    ):
        assert both.total_bytes == own.total_bytes + drafts.total_bytes
    on_cpu = Layout(tensor_split=(), gpu_layers=0, context_size=4096)
    host = estimate(llama_8b, EstimateOptions(parallel=1), on_cpu).host.total_bytes
    assert predictor(loaded)(on_cpu).host.total_bytes > host + small.file_bytes / 2


def test_a_drafting_server_keeps_logits_for_what_it_drafted(llama_8b: ModelMetadata) -> None:
    plain, drafts = (
        estimate(llama_8b, EstimateOptions(draft_tokens=count), ONE_GPU) for count in (0, 16)
    )
    assert drafts.host.compute_bytes - plain.host.compute_bytes == 4 * 16 * 4 * 128256


def test_options_that_no_rule_follows_make_the_estimate_high(llama_8b: ModelMetadata) -> None:
    plain = estimate(llama_8b, EstimateOptions(), ONE_GPU)
    moved = estimate(llama_8b, EstimateOptions(unmodelled=("-ot",)), ONE_GPU)
    assert plain.confident
    assert not moved.confident
    assert moved.devices[0].compute_bytes > 1.25 * plain.devices[0].compute_bytes


def test_a_projector_kept_off_the_gpu_is_the_hosts(llama_8b: ModelMetadata) -> None:
    plain = estimate(llama_8b, EstimateOptions(), ONE_GPU)
    options = EstimateOptions(
        projector_bytes=100, projector_compute_bytes=10, projector_offload=False
    )
    kept = estimate(llama_8b, options, ONE_GPU)
    assert kept.devices == plain.devices
    assert kept.host.total_bytes == plain.host.total_bytes + 110


def test_layers_split_as_the_server_splits_them() -> None:
    # 30 layers and the output by 2 to 1: 21 to the first device (its log: KV 63 and 27 MiB)
    assert layer_devices(30, -1, (2.0, 1.0)) == (0,) * 21 + (1,) * 10
    assert layer_devices(30, -1, (1.0, 1.0)) == (0,) * 16 + (1,) * 15
    assert layer_devices(4, 2, (1.0,)) == (HOST, HOST, HOST, 0, 0)
    assert layer_devices(4, 0, (1.0,)) == (HOST,) * 5
    assert layer_devices(4, -1, ()) == (HOST,) * 5


def test_an_encoder_takes_the_same_whatever_the_context(folder: Path) -> None:
    encoder = metadata_of("bge-large.F16.gguf", folder)
    for split in ((1.0,), (1.0, 1.0), ()):
        small, large = (
            estimate(
                encoder,
                EstimateOptions(flash_attn=FlashAttention.OFF),
                Layout(tensor_split=split, gpu_layers=999, context_size=tokens),
            )
            for tokens in (512, 131072)
        )
        assert small.devices == large.devices
        assert small.host == large.host
