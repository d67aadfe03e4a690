"""What loads were measured to take corrects the next estimate: never under, never falling."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from smartproxy.memory.correct import (
    ROUNDING_BYTES,
    Lesson,
    Vector,
    at_least,
    buffers_of,
    corrected,
    learn,
    overridden,
)
from smartproxy.memory.types import DeviceBytes, Estimate, Layout
from smartproxy.types import MIB

TWO = (1.0, 1.0)


def layout(context_size: int, split: tuple[float, ...] = (1.0,)) -> Layout:
    return Layout(tensor_split=split, gpu_layers=33, context_size=context_size)


def predicted(context_size: int, split: tuple[float, ...] = (1.0,)) -> Estimate:
    """A model of 4000 MiB on each device, a cache of 1 KiB a token, a graph that grows slowly."""
    device = DeviceBytes(
        weights_bytes=4000 * MIB,
        kv_cache_bytes=context_size * 1024,
        compute_bytes=100 * MIB + context_size * 64,
    )
    return Estimate(
        layout=layout(context_size, split),
        devices=(device,) * len(split),
        host=DeviceBytes(weights_bytes=300 * MIB, compute_bytes=20 * MIB),
    )


def lesson(
    context_size: int,
    off_mib: float,
    *,
    split: tuple[float, ...] = (1.0,),
    same: bool = True,
    asked: bool = False,
) -> Lesson:
    """A load that took `off_mib` more on its first device than predicted."""
    expected = buffers_of(predicted(context_size, split))
    measured: Vector = (expected[0] + round(off_mib * MIB), *expected[1:])
    return Lesson(
        layout=layout(context_size, split),
        predicted=expected,
        measured=measured,
        same_options=same,
        asked=asked,
    )


def off_mib(context_size: int, *lessons: Lesson, split: tuple[float, ...] = (1.0,)) -> list[float]:
    """Return by how much each device's and the host's estimate is moved."""
    before = predicted(context_size, split)
    after = corrected(before, learn(lessons))
    pairs = zip(buffers_of(after), buffers_of(before), strict=True)
    return [round((new - old) / MIB, 2) for new, old in pairs]


def test_nothing_learned_changes_nothing() -> None:
    assert corrected(predicted(8192), learn([])) == predicted(8192)


def test_the_same_settings_take_what_was_measured_on_each_device() -> None:
    assert off_mib(8192, lesson(8192, 50)) == [50.02, 0]
    assert off_mib(8192, lesson(8192, -50)) == [-49.98, 0]
    assert off_mib(8192, lesson(8192, 50, split=TWO), split=TWO) == [50.02, 0, 0]


def test_the_logs_rounding_does_not_move_an_exact_estimate() -> None:
    assert off_mib(8192, lesson(8192, -0.01)) == [0, 0]
    assert off_mib(8192, lesson(8192, 0.015)) == [0.02, 0]


def test_another_context_size_is_moved_by_the_difference() -> None:
    assert off_mib(16384, lesson(8192, 50)) == [50.02, 0]
    assert off_mib(16384, lesson(8192, -30)) == [-29.98, 0]
    assert off_mib(4096, lesson(8192, 50)) == [50.02, 0]


def test_between_two_sizes_the_smaller_correction_downwards_counts() -> None:
    assert off_mib(16384, lesson(8192, -40), lesson(32768, -10)) == [-9.98, 0]


def test_a_larger_context_never_takes_less_than_a_smaller_one_was_measured_to() -> None:
    small = lesson(8192, 90)
    after = corrected(predicted(8448), learn([small, lesson(262144, -60)]))
    assert after.devices[0].buffers_bytes >= small.measured[0]


def test_a_smaller_context_never_takes_more_than_a_larger_one_was_measured_to() -> None:
    large = lesson(8192, -60)
    after = corrected(predicted(8000), learn([large]))
    assert after.devices[0].buffers_bytes <= large.measured[0] + ROUNDING_BYTES


def test_exact_parts_are_never_taken_off_for_another_context() -> None:
    after = corrected(predicted(16384), learn([lesson(8192, -1000)]))
    assert after.devices[0].buffers_bytes == 4000 * MIB + 16384 * 1024


def test_tensors_moved_by_hand_shrink_the_same_settings_below_the_exact_parts() -> None:
    after = corrected(predicted(8192), learn([lesson(8192, -3000)]))
    assert after.devices[0].buffers_bytes == lesson(8192, -3000).measured[0] + ROUNDING_BYTES
    assert after.devices[0].compute_bytes == 0


def test_a_shortfall_raises_every_other_setting_of_the_file_at_once() -> None:
    assert off_mib(8192, lesson(2048, 70, same=False)) == [70.02, 0]
    assert off_mib(8192, lesson(2048, 70), split=TWO) == [70.02, 70.02, 0]
    assert off_mib(16384, lesson(8192, -5), lesson(2048, 70)) == [70.02, 0]


def test_a_load_that_took_less_proves_nothing_about_other_settings() -> None:
    assert off_mib(8192, lesson(8192, -70, same=False)) == [0, 0]
    assert off_mib(8192, lesson(8192, -70), split=TWO) == [0, 0, 0]


def test_unused_devices_are_not_charged_for_a_shortfall() -> None:
    idle = replace(predicted(8192, TWO), devices=(predicted(8192).devices[0], DeviceBytes()))
    after = corrected(idle, learn([lesson(8192, 70, same=False)]))
    assert after.devices[1] == DeviceBytes()


def test_of_several_loads_the_one_that_took_most_counts() -> None:
    assert off_mib(8192, lesson(8192, 10), lesson(8192, 30), lesson(8192, 20)) == [30.02, 0]


def test_a_server_that_ran_knows_better_than_a_tool_that_was_asked() -> None:
    ran, asked = lesson(8192, -20), lesson(8192, 60, asked=True)
    assert off_mib(8192, ran, asked) == [-19.98, 0]
    assert off_mib(8192, asked, ran) == [-19.98, 0]
    assert off_mib(8192, asked) == [60.02, 0]
    # what a tool projects is no proof of a shortfall
    assert off_mib(8192, replace(asked, same_options=False)) == [0, 0]


def test_an_override_is_what_the_whole_model_takes_on_one_gpu() -> None:
    whole = predicted(8192)
    said = overridden(whole, wanted_bytes=10_000 * MIB, whole_bytes=whole.total_bytes)
    assert abs(said.total_bytes - 10_000 * MIB) <= 1
    assert said.host == whole.host
    split = overridden(
        predicted(8192, TWO), wanted_bytes=2 * whole.total_bytes, whole_bytes=whole.total_bytes
    )
    assert abs(split.devices[1].total_bytes - 2 * whole.total_bytes) <= 1


def test_an_override_gives_way_to_a_measurement_above_it_only() -> None:
    more, less = learn([lesson(8192, 500)]), learn([lesson(8192, -50)])
    assert at_least(predicted(8192), more).total_bytes > predicted(8192).total_bytes
    assert at_least(predicted(8192), less) == predicted(8192)


CONTEXTS = st.integers(1, 512).map(lambda steps: steps * 256)
LESSONS = st.lists(
    st.builds(
        lesson,
        CONTEXTS,
        st.floats(-200, 400),
        split=st.sampled_from([(1.0,), TWO]),
        same=st.booleans(),
        asked=st.booleans(),
    ),
    max_size=6,
)


@given(LESSONS, CONTEXTS, CONTEXTS)
def test_more_context_never_needs_less(lessons: list[Lesson], one: int, other: int) -> None:
    learned = learn(lessons)
    small, large = (corrected(predicted(c), learned) for c in sorted((one, other)))
    assert small.total_bytes <= large.total_bytes
    assert small.host.total_bytes <= large.host.total_bytes


@given(LESSONS)
def test_never_under_what_the_same_settings_were_measured_to_take(lessons: list[Lesson]) -> None:
    learned = learn(lessons)
    for each in lessons:
        if each.same_options and not each.asked:
            split = each.layout.tensor_split
            after = buffers_of(corrected(predicted(each.layout.context_size, split), learned))
            assert all(ours >= true for ours, true in zip(after, each.measured, strict=True))


@given(LESSONS, CONTEXTS)
def test_parts_add_up_and_none_is_negative(lessons: list[Lesson], context: int) -> None:
    for device in corrected(predicted(context, TWO), learn(lessons)).devices:
        parts = (device.weights_bytes, device.kv_cache_bytes, device.compute_bytes)
        assert min(parts) >= 0
        assert sum(parts) == device.buffers_bytes
