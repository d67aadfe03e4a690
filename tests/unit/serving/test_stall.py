"""When `serve` takes the manager's loop for standing."""

from __future__ import annotations

from smartproxy.serving.stall import Stall
from smartproxy.signs import RESTING


def test_time_without_a_pass_adds_up_and_a_pass_ends_it() -> None:
    stall = Stall()
    assert [stall.look(7, 1.0, now / 2) for now in range(5)] == [0, 0.5, 1.0, 1.5, 2.0]
    assert stall.look(7, 3.0, 2.5) == 0


def test_another_manager_begins_anew() -> None:
    stall = Stall()
    stall.look(7, None, 0)
    assert stall.look(7, None, 1) == 1
    assert stall.look(8, None, 2) == 0


def test_a_pause_of_the_whole_machine_counts_for_little() -> None:
    stall = Stall()
    stall.look(7, 1.0, 0)
    assert stall.look(7, 1.0, 3600) == 1


def test_a_loop_that_has_ended_on_purpose_does_not_stand() -> None:
    stall = Stall()
    assert [stall.look(7, RESTING, now) for now in range(100)] == [0] * 100
