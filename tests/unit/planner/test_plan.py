"""The planner as a whole: what each load gets, over hand-made and generated worlds."""

from __future__ import annotations

from dataclasses import replace

from smartproxy.memory.types import DeviceBytes, Estimate, Layout
from smartproxy.planner.explain import explain
from smartproxy.planner.plan import plan
from smartproxy.planner.types import Decision, Promise, Strategy
from smartproxy.types import GIB, ServerState
from tests.support import worlds
from tests.support.worlds import NOW, gpu, load, server, snapshot

# --- what each load gets ---------------------------------------------------------------------


def only(decision: Decision, kind: str) -> str:
    """Return the one outcome's text, after checking that it is the only one of its kind."""
    outcomes = {
        "start": [start.placement.reason for start in decision.starts],
        "wait": [wait.reason for wait in decision.waits],
        "refuse": [refusal.message for refusal in decision.refusals],
    }
    assert [name for name, texts in outcomes.items() for _ in texts] == [kind]
    return outcomes[kind][0]


def gpus_of(decision: Decision) -> list[int]:
    (start,) = decision.starts
    return [share.index for share in start.placement.gpus]


def test_loads_wait_for_the_first_look_at_the_gpus() -> None:
    decision = plan(snapshot(None, loads=[load("m", 2), load("c", 2, force_cpu=True)]))
    assert [wait.model_id for wait in decision.waits] == ["m", "c"]
    assert "first look" in decision.waits[0].reason


def test_without_a_gpu_everything_runs_on_the_cpu() -> None:
    decision = plan(snapshot([], loads=[load("m", 40)]))
    assert "there is no GPU" in only(decision, "start")
    placement = decision.starts[0].placement
    assert placement.gpus == ()
    assert placement.layout.tensor_split == ()
    assert placement.on_cpu_for_want_of_gpu


def test_model_goes_to_the_gpu_with_most_free_memory() -> None:
    decision = plan(snapshot([gpu(0, 12), gpu(1, 24), gpu(2, 16)], loads=[load("m", 8)]))
    assert gpus_of(decision) == [1]
    assert only(decision, "start") == (
        "model 'm' on GPU 1 (Card 24): 8.0 GB of 24.0 GB free (single-gpu-preferred)"
    )


def test_gpu_in_use_by_others_comes_second() -> None:
    gpus = [gpu(0, 12), gpu(1, 24, utilization=80)]
    assert gpus_of(plan(snapshot(gpus, loads=[load("m", 8)]))) == [0]
    assert gpus_of(plan(snapshot(gpus, loads=[load("m", 20)]))) == [1]


def test_slices_of_a_gpu_take_whole_models_only() -> None:
    slices = [gpu(index, 20, mig=True) for index in (1000, 1001)]
    assert gpus_of(plan(snapshot(slices, loads=[load("m", 15)]))) == [1000]
    refused = only(plan(snapshot(slices, loads=[load("m", 30)])), "refuse")
    assert "needs 30.0 GB, largest set of GPUs has 20.0 GB (1 GPU, headroom taken off)" in refused
    # whole GPUs beside them are split over without them
    gpus = [*slices, gpu(0, 18), gpu(1, 18)]
    assert sorted(gpus_of(plan(snapshot(gpus, loads=[load("m", 30)])))) == [0, 1]
    spread = load("m", 12, strategy=Strategy.DISTRIBUTE)
    assert sorted(gpus_of(plan(snapshot(gpus, loads=[spread])))) == [0, 1]
    assert len(gpus_of(plan(snapshot(slices, loads=[spread])))) == 1


def test_promise_not_yet_visible_counts_as_used() -> None:
    starting = server(
        1,
        "s",
        {},
        holds={"GPU-0": Promise(reserved_bytes=14 * GIB, visible_bytes=4 * GIB)},
        state=ServerState.STARTING,
        ready_at=None,
    )
    fits = plan(snapshot([gpu(0, 24)], [starting], [load("m", 10)]))
    assert gpus_of(fits) == [0]
    too_much = plan(snapshot([gpu(0, 24)], [starting], [load("m", 10.25)]))
    assert "'s' (starting)" in only(too_much, "wait")


def test_memory_of_strangers_is_not_given_away() -> None:
    decision = plan(snapshot([gpu(0, 24, strangers_gb=12)], loads=[load("m", 13)]))
    text = only(decision, "wait")
    assert "needs 13.0 GB" in text
    assert "GPU 0 has 12.0 GB of 24.0 GB free" in text
    assert decision.waits[0].code_at_timeout == "gpu_memory_busy"


def test_where_the_driver_tells_no_process_memory_servers_are_not_counted_twice() -> None:
    silent = server(1, "s", {}, holds={"GPU-0": Promise(reserved_bytes=10 * GIB, visible_bytes=0)})
    card = gpu(0, 24, used_bytes=10 * GIB, free_bytes=14 * GIB)
    world = replace(snapshot([], [silent], [load("m", 14)]), gpus=(card,))
    world = replace(world, overhead_bytes={"GPU-0": worlds.OVERHEAD_BYTES})
    assert gpus_of(plan(world)) == [0]


def test_memory_of_a_server_that_loads_unseen_drives_no_model_to_the_cpu() -> None:
    """In a container NVML shows used memory but not whose; later looks tell it is ours."""
    promised = {"GPU-0": Promise(reserved_bytes=10 * GIB, visible_bytes=0)}
    starting = server(1, "s", {}, holds=promised, state=ServerState.STARTING, ready_at=None)
    waiting = load("m", 15, cpu_fallback=True)
    long_loaded = replace(starting, state=ServerState.READY, ready_at=NOW - 60, busy=1)
    for one, used_gb, waits in (
        (starting, 10, True),
        (starting, 0, True),
        (starting, 20, False),
        (long_loaded, 10, True),
        (long_loaded, 20, False),
    ):
        card = gpu(0, 24, used_bytes=used_gb * GIB, free_bytes=(24 - used_gb) * GIB)
        world = replace(snapshot([], [one], [waiting]), gpus=(card,))
        world = replace(world, overhead_bytes={"GPU-0": worlds.OVERHEAD_BYTES})
        assert bool(plan(world).waits) == waits


def test_headroom_is_left_free() -> None:
    world = snapshot([gpu(0, 24)], loads=[load("m", 23.5)], headroom_bytes=GIB)
    text = only(plan(world), "refuse")
    assert "needs 23.5 GB, largest set of GPUs has 23.0 GB" in text


def test_too_big_for_all_gpus_together_is_refused_with_the_numbers() -> None:
    decision = plan(snapshot([gpu(0, 12), gpu(1, 24)], loads=[load("m", 50)]))
    assert decision.refusals[0].code == "insufficient_gpu_memory"
    text = only(decision, "refuse")
    assert "largest set of GPUs has 36.0 GB (2 GPUs" in text
    assert "lower ctx_size" in text


def test_gpu_named_in_the_configuration_but_missing_is_said() -> None:
    absent = load("m", 2, allowed_uuids=frozenset({"gpu 7"}))
    assert "none of the GPUs it may use" in only(plan(snapshot([gpu(0)], loads=[absent])), "refuse")


def test_gpu_in_error_takes_no_model_and_is_waited_for() -> None:
    broken = gpu(0, 24, error="fell off the bus")
    assert gpus_of(plan(snapshot([broken, gpu(1, 8)], loads=[load("m", 4)]))) == [1]
    text = only(plan(snapshot([broken, gpu(1, 8)], loads=[load("m", 12, max_gpus=1)])), "wait")
    assert "GPU 0 is in error (fell off the bus)" in text


def test_model_that_fits_no_single_gpu_is_split_over_the_fewest() -> None:
    decision = plan(snapshot([gpu(0, 12), gpu(1, 24), gpu(2, 16)], loads=[load("m", 34)]))
    assert gpus_of(decision) == [1, 2]
    assert decision.starts[0].placement.layout.tensor_split == (10.0, 6.0)
    assert "on one GPU it needs 34.0 GB, and at most 24.0 GB is free" in only(decision, "start")


def test_distributed_model_that_may_have_one_gpu_only_gets_the_roomiest() -> None:
    waiting = load("m", 4, strategy=Strategy.DISTRIBUTE, max_gpus=1)
    assert gpus_of(plan(snapshot([gpu(0, 8), gpu(1, 24), gpu(2, 12)], loads=[waiting]))) == [1]


def test_vacant_gpus_are_split_over_first() -> None:
    cards = [gpu(0, 16, utilization=90), gpu(1, 12), gpu(2, 12)]
    assert gpus_of(plan(snapshot(cards, loads=[load("m", 20)]))) == [1, 2]
    assert gpus_of(plan(snapshot(cards, loads=[load("m", 26)]))) == [0, 1]


def test_two_loads_that_fit_side_by_side_start_together() -> None:
    decision = plan(snapshot([gpu(0, 24)], loads=[load("a", 10), load("b", 14)]))
    assert [start.model_id for start in decision.starts] == ["a", "b"]


def test_second_load_that_does_not_fit_beside_the_first_waits_for_it() -> None:
    decision = plan(snapshot([gpu(0, 24)], loads=[load("a", 10), load("b", 14.25)]))
    assert [start.model_id for start in decision.starts] == ["a"]
    assert decision.waits[0].reason == "model 'b' waits behind older loads"


# --- partial offload, CPU, context -----------------------------------------------------------


def test_partial_offload_puts_as_many_layers_as_fit() -> None:
    sketch = worlds.sketch_of(18 * GIB)
    decision = plan(snapshot([gpu(0, 12)], loads=[load("m", sketch=sketch, partial_offload=True)]))
    layout = decision.starts[0].placement.layout
    one_more = replace(layout, gpu_layers=layout.gpu_layers + 1)
    assert 0 < layout.gpu_layers < 16
    assert sketch.estimate(layout).total_bytes + worlds.OVERHEAD_BYTES <= 12 * GIB
    assert sketch.estimate(one_more).total_bytes + worlds.OVERHEAD_BYTES > 12 * GIB
    assert f"{layout.gpu_layers} of 16 layers" in only(decision, "start")


def test_experts_go_to_the_host_before_layers_do() -> None:
    sketch = worlds.Sketch(layers=9, layer_bytes=2 * GIB, expert_bytes=int(1.75 * GIB))
    decision = plan(snapshot([gpu(0, 12)], loads=[load("m", sketch=sketch, partial_offload=True)]))
    layout = decision.starts[0].placement.layout
    fewer = replace(layout, cpu_moe_layers=layout.cpu_moe_layers - 1)
    assert layout.gpu_layers == 9
    assert layout.cpu_moe_layers > 0
    assert sketch.estimate(fewer).total_bytes + worlds.OVERHEAD_BYTES > 12 * GIB


def test_partial_offload_is_not_for_models_that_fit_once_idle_ones_are_gone() -> None:
    idle = server(1, "idle", {"GPU-0": 10})
    decision = plan(snapshot([gpu(0, 12)], [idle], [load("m", 8, partial_offload=True)]))
    assert [eviction.model_id for eviction in decision.evictions] == ["idle"]


def test_too_big_for_the_gpus_runs_on_the_cpu_where_that_is_allowed() -> None:
    decision = plan(snapshot([gpu(0, 12)], loads=[load("m", 18, cpu_fallback=True)]))
    assert "cpu_fallback" in only(decision, "start")
    assert not decision.starts[0].placement.on_cpu_for_want_of_gpu


def test_load_started_in_the_same_breath_does_not_drive_another_to_the_cpu() -> None:
    loads = [load("a", 10), load("b", 10, cpu_fallback=True)]
    decision = plan(snapshot([gpu(0, 12)], loads=loads))
    assert [start.model_id for start in decision.starts] == ["a"]
    assert [wait.model_id for wait in decision.waits] == ["b"]


def test_automatic_context_is_the_largest_that_fits() -> None:
    sketch = worlds.sketch_of(10 * GIB)
    waiting = load("m", sketch=sketch, context_size=None)
    layout = plan(snapshot([gpu(0, 12)], loads=[waiting])).starts[0].placement.layout
    more = replace(layout, context_size=layout.context_size + 256)
    assert layout.context_size % 256 == 0
    assert layout.context_size > 8192
    assert sketch.estimate(layout).total_bytes + worlds.OVERHEAD_BYTES <= 12 * GIB
    assert sketch.estimate(more).total_bytes + worlds.OVERHEAD_BYTES > 12 * GIB


def test_automatic_context_stops_at_the_models_own() -> None:
    waiting = load("m", 4, context_size=None, max_context_size=16384)
    layout = plan(snapshot([gpu(0, 24)], loads=[waiting])).starts[0].placement.layout
    assert layout.context_size == 16384


def test_whole_context_on_two_gpus_does_not_beat_a_smaller_one_on_one() -> None:
    waiting = load("m", 10, context_size=None)
    assert gpus_of(plan(snapshot([gpu(0, 12), gpu(1, 12)], loads=[waiting]))) == [0]


def test_server_on_the_cpu_for_want_of_a_gpu_is_drained_once_there_is_one() -> None:
    wanting = server(1, "m", {}, on_cpu_for_want_of_gpu=True)
    assert [e.server_id for e in plan(snapshot([gpu(0)], [wanting])).evictions] == [1]
    assert plan(snapshot([], [wanting])).evictions == ()
    assert plan(snapshot([gpu(0)], [replace(wanting, busy=1)])).evictions == ()
    assert plan(snapshot([gpu(0, error="lost")], [wanting])).evictions == ()


# --- making room -----------------------------------------------------------------------------


def evicted(decision: Decision) -> list[str]:
    return [eviction.model_id for eviction in decision.evictions]


def test_least_recently_used_of_equals_makes_room() -> None:
    idle = [server(n, f"m{n}", {"GPU-0": 8}, last_used_at=NOW - 100 + 10 * n) for n in (3, 1, 2)]
    decision = plan(snapshot([gpu(0, 24)], idle, [load("new", 8)]))
    assert evicted(decision) == ["m1"]
    assert "frees 8.0 GB, idle for 90 s" in decision.evictions[0].reason
    assert "waits for 'm1' to make room" in only(decision, "wait")


def test_only_servers_whose_end_helps_are_chosen() -> None:
    old_and_useless = server(1, "old", {"GPU-0": 4}, last_used_at=NOW - 900)
    useful = server(2, "useful", {"GPU-1": 16}, last_used_at=NOW - 10)
    world = snapshot([gpu(0, 6), gpu(1, 24)], [old_and_useless, useful], [load("new", 12)])
    assert evicted(plan(world)) == ["useful"]


def test_one_big_victim_is_not_joined_by_a_small_one() -> None:
    servers = [
        server(1, "small", {"GPU-0": 2}, last_used_at=NOW - 900, load_s=1),
        server(2, "big", {"GPU-0": 12}, last_used_at=NOW - 60),
    ]
    assert evicted(plan(snapshot([gpu(0, 16)], servers, [load("new", 12)]))) == ["big"]


def test_need_measured_below_its_layers_sum_is_made_room_for() -> None:
    """Tensors moved to the host by hand: the layout that was measured takes less than its parts."""
    waiting = load("new", 30)
    whole = waiting.need.estimate

    def measured(layout: Layout) -> Estimate:
        predicted = whole(layout)
        if len(layout.tensor_split) > 1:
            return predicted
        return replace(predicted, devices=(DeviceBytes(weights_bytes=10 * GIB),))

    waiting = replace(waiting, need=replace(waiting.need, estimate=measured))
    idle = [server(1, "idle", {"GPU-0": 8}), server(2, "other", {"GPU-1": 8}, pinned=True)]
    assert evicted(plan(snapshot([gpu(0, 12), gpu(1, 12)], idle, [waiting]))) == ["idle"]


def test_pinned_server_stays_and_is_named() -> None:
    pinned = server(1, "kept", {"GPU-0": 20}, pinned=True)
    decision = plan(snapshot([gpu(0, 24)], [pinned], [load("new", 8)]))
    assert evicted(decision) == []
    assert "pinned: 'kept'" in only(decision, "wait")


def test_what_is_on_its_way_out_is_waited_for() -> None:
    servers = [
        server(1, "leaving", {"GPU-0": 12}, state=ServerState.DRAINING, busy=2),
        server(2, "idle", {"GPU-0": 8}),
    ]
    decision = plan(snapshot([gpu(0, 24)], servers, [load("new", 10)]))
    assert evicted(decision) == []
    assert "'leaving' finishes 2 requests" in only(decision, "wait")


def test_server_loaded_a_moment_ago_is_waited_for() -> None:
    fresh = server(1, "fresh", {"GPU-0": 20}, ready_at=NOW - 2)
    decision = plan(snapshot([gpu(0, 24)], [fresh], [load("new", 8)], min_residency_s=5))
    assert evicted(decision) == []
    assert "waits 3.0 s for 'fresh'" in only(decision, "wait")


def test_busy_server_is_waited_for_at_first_then_drained() -> None:
    busy = server(1, "busy", {"GPU-0": 20}, busy=2)
    decision = plan(snapshot([gpu(0, 24)], [busy], [load("new", 8)]))
    assert evicted(decision) == []
    assert "'busy' (2 requests)" in only(decision, "wait")
    decision = plan(snapshot([gpu(0, 24)], [busy], [load("new", 8, asked_at=NOW - 11)]))
    assert [(e.model_id, e.drains_busy) for e in decision.evictions] == [("busy", True)]


def test_busy_server_that_was_long_in_loading_serves_as_long_before_it_is_drained() -> None:
    waiting = load("new", 8, asked_at=NOW - 60)
    # a fifth of queue_timeout at most
    for loaded_s, load_s, drains in ((20, 30, False), (31, 30, True), (61, 600, True)):
        busy = server(1, "busy", {"GPU-0": 20}, busy=2, ready_at=NOW - loaded_s, load_s=load_s)
        world = snapshot([gpu(0, 24)], [busy], [waiting], queue_timeout_s=300)
        assert bool(evicted(plan(world))) == drains


def test_idle_servers_go_before_a_busy_one_however_dear() -> None:
    servers = [
        server(1, "busy", {"GPU-0": 12}, busy=1, load_s=1),
        server(2, "idle", {"GPU-0": 12}, load_s=500, last_used_at=NOW, recent_requests=1000),
    ]
    decision = plan(snapshot([gpu(0, 24)], servers, [load("new", 8, asked_at=NOW - 60)]))
    assert [(e.model_id, e.drains_busy) for e in decision.evictions] == [("idle", False)]


def test_younger_load_does_not_take_what_is_being_freed_for_an_older_one() -> None:
    leaving = server(1, "leaving", {"GPU-0": 12}, state=ServerState.STOPPING)
    old, young = load("old", 20, asked_at=NOW - 5), load("young", 8)
    decision = plan(snapshot([gpu(0, 24)], [leaving], [old, young]))
    assert decision.starts == ()
    beside = plan(snapshot([gpu(0, 24)], [leaving], [old, load("young", 4)]))
    assert [start.model_id for start in beside.starts] == ["young"]


def test_younger_load_may_pass_one_that_waits_for_a_busy_server_only_at_first() -> None:
    servers = [server(1, "busy", {"GPU-0": 16}, busy=1), server(2, "other", {"GPU-1": 8})]
    gpus = [gpu(0, 24), gpu(1, 8)]
    for waited_s, passes in ((1, True), (60, False)):
        old, young = load("old", 20, asked_at=NOW - waited_s), load("young", 8, max_gpus=1)
        decision = plan(snapshot(gpus, servers, [old, young]))
        starts = [start.model_id for start in decision.starts]
        assert starts == (["young"] if passes else [])


def test_full_pool_makes_a_place_even_where_memory_is_free() -> None:
    servers = [
        server(1, "a", {"GPU-0": 2}, last_used_at=NOW - 100),
        server(2, "b", {}, last_used_at=NOW - 300, load_s=10),
    ]
    decision = plan(snapshot([gpu(0, 24)], servers, [load("new", 8)], pool_size=2))
    assert evicted(decision) == ["b"]
    assert "frees a place in the pool" in decision.evictions[0].reason
    assert decision.waits[0].code_at_timeout == "pool_busy"


def test_pool_full_of_busy_servers_is_pool_busy() -> None:
    busy = [server(n, f"b{n}", {}, busy=1) for n in (1, 2)]
    decision = plan(snapshot([], busy, [load("new", 8)], pool_size=2))
    assert evicted(decision) == []
    assert decision.waits[0].code_at_timeout == "pool_busy"


def test_stopping_server_is_a_place_coming_free() -> None:
    servers = [server(1, "going", {}, state=ServerState.STOPPING), server(2, "idle", {})]
    decision = plan(snapshot([], servers, [load("new", 8)], pool_size=2))
    assert evicted(decision) == []
    assert "'going' is stopping" in only(decision, "wait")


def test_model_whose_server_still_lives_is_not_started_twice() -> None:
    servers = [server(1, "m", {"GPU-0": 4}, state=ServerState.DRAINING)]
    assert "it is draining" in only(plan(snapshot([gpu(0)], servers, [load("m", 4)])), "wait")


# --- explaining ------------------------------------------------------------------------------


def test_explanation_shows_every_gpu_with_its_numbers() -> None:
    cards = [gpu(0, 8), gpu(1, 24), gpu(2, 24, error="lost"), gpu(3, 24, utilization=80)]
    held = [server(1, "x", {"GPU-1": 16}), server(2, "y", {"GPU-3": 20})]
    waiting = load("m", 12, allowed_uuids=frozenset({"GPU-0", "GPU-1", "GPU-2"}), max_gpus=1)
    told = explain(snapshot(cards, held), waiting)
    assert told.action == "evict"
    assert [eviction.model_id for eviction in told.evictions] == ["x"]
    assert told.placement is not None
    assert [share.index for share in told.placement.gpus] == [1]
    assert [candidate.note for candidate in told.candidates] == [
        "too small for the whole model: 12.0 GB needed, 8.0 GB when empty",
        "no room: 12.0 GB needed, 8.0 GB free",
        "in error: lost",
        "not allowed (`gpus`)",
    ]


def test_explanation_of_a_waiting_load_is_what_the_plan_does() -> None:
    first, second = load("a", 10, asked_at=NOW - 1), load("b", 14.25)
    told = explain(snapshot([gpu(0, 24)], loads=[first, second]), second)
    assert (told.action, told.code) == ("wait", "gpu_memory_busy")
    assert explain(snapshot([gpu(0, 24)], loads=[first, second]), first).action == "start"


def test_explanation_of_a_loaded_model_says_so() -> None:
    told = explain(snapshot([gpu(0)], [server(1, "m", {"GPU-0": 4})]), load("m", 4))
    assert (told.action, told.code) == ("loaded", None)
