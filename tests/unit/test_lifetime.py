"""A process is named by its pid and the ticks of its start."""

from __future__ import annotations

import os
import resource

from smartproxy.lifetime import same_process, start_ticks, worker_alive, worker_id


def test_this_process_has_a_start_and_it_stays() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    assert ticks > 0
    assert same_process(os.getpid(), ticks)
    assert not same_process(os.getpid(), ticks + 1)
    assert not same_process(None, ticks)
    assert not same_process(os.getpid(), None)


def test_without_descriptors_a_living_process_is_not_taken_for_dead() -> None:
    """Found by chaos: an adopted server became an orphan while the manager had none left."""
    ticks = start_ticks(os.getpid())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        lives = same_process(os.getpid(), ticks)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert lives


def test_a_worker_is_known_by_its_name() -> None:
    name = worker_id()
    assert worker_alive(name)
    pid, _, ticks = name.partition(":")
    assert not worker_alive(f"{pid}:{int(ticks) + 1}")


def test_names_of_an_earlier_version_name_no_living_worker() -> None:
    assert not worker_alive(f"{os.getpid()}:1764232000.25")
    assert not worker_alive("worker")
