"""What goes wrong, and when: a few faults a seed."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from smartproxy.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.simulation.story import Story


def bring(story: Story, faults: Sequence[Callable[[Story], None]]) -> None:
    """Bring a few of these faults, one after another."""
    chance = story.chance
    for _ in range(chance.choice((1, 2, 2, 3, 4)) if faults else 0):
        story.scheduler.sleep(chance.uniform(0.0, 1.0))
        if story.healed:
            return
        fault = chance.choice(faults)
        story.scheduler.note("FAULT: %s", fault.__name__)
        fault(story)


def a_write_fails(story: Story) -> None:
    story.weather.until_failure = story.chance.randrange(0, 40)


def the_disk_is_full(story: Story) -> None:
    weather = story.weather
    weather.kinds = ("full", "full at commit")
    weather.failing_share = story.chance.choice((0.3, 1.0))
    story.scheduler.sleep(story.chance.choice((0.05, 0.5, 1.5)))
    weather.failing_share = 0.0


def a_lock_is_held(story: Story) -> None:
    story.weather.kinds = ("locked",)
    story.weather.until_failure = story.chance.randrange(0, 20)


def a_server_dies(story: Story) -> None:
    servers = list(story.machine.servers.values())
    if servers:
        number = story.chance.choice((signal.SIGKILL, signal.SIGSEGV))
        story.machine.end(story.chance.choice(servers), -number)


def the_manager_dies(story: Story) -> None:
    if story.manager is not None and not story.manager.dead:
        story.manager.kill()


def the_manager_is_restarted(story: Story) -> None:
    if story.manager is not None:
        story.manager.orders.stopping.set()
        story.manager.orders.poke()


def a_worker_dies(story: Story) -> None:
    worker = story.chance.choice(story.workers)
    story.workers.remove(worker)
    worker.kill()
    if not story.workers:
        story.start_worker()


def the_clock_jumps(story: Story) -> None:
    seconds = story.chance.choice((-3600, -30, 3, 30, 3600))
    story.scheduler.note("by %d s", seconds)
    story.scheduler.wall_offset_s += seconds


def servers_are_silent(story: Story) -> None:
    story.machine.silent_share = 0.4
    story.scheduler.sleep(1.0)
    story.machine.silent_share = 0.0


def a_gpu_is_lost(story: Story) -> None:
    machine = story.machine
    if machine.gpu_bytes:
        machine.failed_gpus.add(story.chance.choice(list(machine.gpu_bytes)))
        story.scheduler.sleep(story.chance.choice((0.5, 2.0)))
        machine.failed_gpus.clear()


def nvml_hangs(story: Story) -> None:
    story.machine.nvml_hangs_until = story.scheduler.now + story.chance.choice((0.5, 5.0))


def a_model_is_unloaded(story: Story) -> None:
    with contextlib.suppress(StateError):
        story.ask_manager("unload", story.chance.choice(list(story.world.model_bytes)))


def ports_are_taken(story: Story) -> None:
    ports = story.world.configured.settings.server_pool.ports
    story.machine.strangers_ports.update(port for port in ports if story.chance.random() < 0.5)


ALL: tuple[Callable[[Story], None], ...] = (
    a_write_fails,
    a_write_fails,
    a_write_fails,
    the_disk_is_full,
    a_lock_is_held,
    a_server_dies,
    a_server_dies,
    the_manager_dies,
    the_manager_is_restarted,
    a_worker_dies,
    the_clock_jumps,
    servers_are_silent,
    a_gpu_is_lost,
    nvml_hangs,
    a_model_is_unloaded,
    ports_are_taken,
)
