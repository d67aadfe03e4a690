"""The machine: files, memory, cores and the clock run short, or run away."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from functools import partial

import psutil

from tests.chaos.fault import CUT, Faulty, Scene, fault
from tests.chaos.load import chat
from tests.chaos.machine import HOME, MANNERED, OTHERS

#: a worker without descriptors can reach no server
NO_FILES = frozenset({"backend_failed", "manager_unavailable"})


def _limited(pid: int, what: int, soft: int) -> tuple[int, int]:
    """Set a soft limit of a process and return what it was."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, before[1]))
    return before


@fault("a worker has no descriptors left", CUT, NO_FILES, hold_s=(0.5, 2.0), weight=2)
def worker_without_files(scene: Scene) -> Faulty:
    """F7: after it, the worker accepts again."""
    pid = scene.chooser.choice(scene.tree.worker)
    before = _limited(pid, resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds())
    yield
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        scene.await_(lambda: _answers(scene, pid), f"worker {pid} accepts again")


def _answers(scene: Scene, pid: int) -> bool:
    """Return whether a worker takes connections: by those it has while many are open."""
    if not psutil.pid_exists(pid):
        return True
    before = psutil.Process(pid).num_fds()
    done = threading.Event()

    def one() -> None:
        scene.judged("stream", "home-1", chat("home-1", stream=True, tokens=20, token_s=0.02))
        done.set()

    for _ in range(12):
        scene.beside(one)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if psutil.Process(pid).num_fds() > before:
            return True
        time.sleep(0.005)
    return False


@fault("all workers have no descriptors left", CUT, NO_FILES, hold_s=(0.5, 1.5))
def workers_without_files(scene: Scene) -> Faulty:
    pids = scene.tree.worker
    before = {
        pid: _limited(pid, resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds()) for pid in pids
    }
    yield
    for pid, limits in before.items():
        if psutil.pid_exists(pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@fault(
    "the manager has no descriptors left",
    "model_load_failed",
    NO_FILES,
    hold_s=(0.5, 2.0),
)
def manager_without_files(scene: Scene) -> Faulty:
    pid = scene.tree.manager[0]
    before = _limited(pid, resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds())
    yield
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@fault("a worker gets no more memory", CUT, "internal_error", hold_s=(0.5, 1.5))
def worker_without_memory(scene: Scene) -> Faulty:
    pid = scene.chooser.choice(scene.tree.worker)
    size = psutil.Process(pid).memory_info().vms
    before = _limited(pid, resource.RLIMIT_AS, size + (8 << 20))
    yield
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_AS, before)


@fault("the manager gets no more memory", "model_load_failed", NO_FILES, hold_s=(0.5, 1.5))
def manager_without_memory(scene: Scene) -> Faulty:
    pid = scene.tree.manager[0]
    size = psutil.Process(pid).memory_info().vms
    before = _limited(pid, resource.RLIMIT_AS, size + (8 << 20))
    yield
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_AS, before)


@fault("a program takes much memory for a while", hold_s=(0.5, 1.0))
def memory_pressure(scene: Scene) -> Faulty:
    size = min(psutil.virtual_memory().available // 3, 2 << 30)
    hog = f"held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); input()"
    process = subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE)
    yield
    process.kill()
    process.wait()


@fault("programs take every core for a while", hold_s=(1.0, 2.5))
def hogs(scene: Scene) -> Faulty:
    count = 2 * len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@fault("the clock is set an hour ahead", hold_s=(0.5, 2.0))
def clock_ahead(scene: Scene) -> Faulty:
    scene.machine.set_clock(3600.0)
    yield
    scene.machine.set_clock(0.0)


@fault("the clock is set an hour back", hold_s=(0.5, 2.0))
def clock_back(scene: Scene) -> Faulty:
    scene.machine.set_clock(-3600.0)
    yield
    scene.machine.set_clock(0.0)


@fault("the clock jumps to and fro", hold_s=(0.1, 0.2))
def clock_jumps(scene: Scene) -> Faulty:
    for _ in range(8):
        scene.machine.set_clock(scene.chooser.choice((-86400.0, -30.0, -3.0, 3.0, 30.0, 86400.0)))
        time.sleep(0.2)
    scene.machine.set_clock(0.0)
    yield


@fault(
    "all models are asked for at once",
    "gpu_memory_busy",
    "pool_busy",
    hold_s=(0.5, 1.0),
    weight=2,
)
def thrash(scene: Scene) -> Faulty:
    wanted = [*HOME, *OTHERS, *MANNERED]
    scene.chooser.shuffle(wanted)
    for model in (name for name in wanted if name not in ("ignores-term", "slow-load")):
        scene.beside(partial(scene.judged, "plain", model, chat(model)))
    yield
    scene.settle(50)
