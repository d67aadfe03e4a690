"""What the manager keeps in memory: every owner is used by several threads at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from smartproxy.llama.process import Child
from smartproxy.manager.children import Children
from smartproxy.manager.context import Preload
from smartproxy.manager.failures import FIRST_BACKOFF_S, Failures
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.shortage import Shortage, Shortages

ROUNDS = 2000


def child(number: int) -> Child:
    return Child(pid=number + 1, start_ticks=0)


def at_once(*works: Callable[[], object]) -> None:
    """Run works in threads of their own; raises what one of them raises."""
    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(work) for work in works]:
            done.result()


def test_children_are_looked_through_while_others_come_and_go() -> None:
    children = Children()
    for number in range(100):
        children.add(-number, child(number))

    def come_and_go() -> None:
        for number in range(1, ROUNDS):
            children.add(number, child(number))
            children.take(number)

    def look() -> None:
        for _ in range(ROUNDS):
            assert all(found.pid for found in children.snapshot().values())

    at_once(come_and_go, look, look)
    assert len(children.snapshot()) == 100


def test_a_child_is_taken_once() -> None:
    children = Children()
    children.add(1, child(os.getpid()))
    assert children.get(1) == children.take(1) == child(os.getpid())
    assert children.take(1) is None
    assert children.get(1) is None


def test_a_server_whose_thread_failed_rests_before_another_carries_it_on() -> None:
    children = Children()
    children.begin(1)
    children.end(1, failed=True)
    assert children.is_carried(1)  # else a full disk would be tried thousands of times a second
    deadline = time.monotonic() + 30
    while children.is_carried(1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children.begin(1)
    children.end(1)
    assert not children.is_carried(1)


def test_failures_in_a_row_double_the_pause_until_one_is_put_back() -> None:
    failures = Failures(time.time)
    assert failures.add("m", "load_timeout", "slow") is None
    first = failures.get("m")
    assert first is not None
    assert first.holds(first.at + 0.9 * FIRST_BACKOFF_S)
    assert not first.holds(first.at + FIRST_BACKOFF_S)
    assert failures.add("m", "model_load_failed", "gone") == first
    second = failures.get("m")
    assert second is not None
    assert second.holds(second.at + 1.9 * FIRST_BACKOFF_S)
    failures.put_back("m", first)
    assert failures.get("m") == first
    failures.put_back("m", None)
    assert failures.get("m") is None


def test_no_failure_is_lost_when_threads_fail_together() -> None:
    failures = Failures(time.time)

    def fail() -> None:
        for _ in range(ROUNDS):
            failures.add("m", "load_timeout", "slow")

    at_once(fail, fail)
    last = failures.get("m")
    assert last is not None
    assert last.times == 2 * ROUNDS


def test_a_model_that_has_loaded_may_run_short_once_more_and_stays_raised() -> None:
    shortages = Shortages(Preload())
    assert shortages.get("m") == Shortage()
    shortages.put("m", Shortage(raised_bytes=5, trying_again=True))
    shortages.settled("m")
    shortages.settled("other")
    assert shortages.get("m") == Shortage(raised_bytes=5, trying_again=False)
    assert shortages.get("other") == Shortage()


def test_a_preload_is_taken_out_once_it_was_tried() -> None:
    preload = Preload(["b", "a"])
    preload.discard("b")
    preload.discard("nobody")
    preload.add("c")
    assert preload.ids() == ["a", "c"]


def test_a_look_that_is_asked_for_wakes_the_loop_and_is_taken_once() -> None:
    pokes: list[None] = []
    view = GpuView(lambda: pokes.append(None))
    assert not view.take_wanted()
    view.want_look()
    assert pokes
    assert view.take_wanted()
    assert not view.take_wanted()
    assert view.gpus == ()
