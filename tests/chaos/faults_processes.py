"""The proxy's own processes: killed, ended, stopped and continued, hung up, started twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from tests.chaos.client import Failure
from tests.chaos.fault import CUT, STOPPING, Faulty, Scene, fault
from tests.chaos.load import chat, operation
from tests.chaos.machine import becomes, send

#: what a proxy that is gone altogether answers until it is started again
NOBODY = CUT | {Failure.REFUSED}
EXIT_LOCKED = 3


@fault("a worker is killed", CUT, weight=3)
def kill_a_worker(scene: Scene) -> Faulty:
    send(scene.chooser.choice(scene.tree.worker), signal.SIGKILL)
    yield


@fault("all workers are killed", CUT)
def kill_all_workers(scene: Scene) -> Faulty:
    for pid in scene.tree.worker:
        send(pid, signal.SIGKILL)
    yield


@fault("a worker is told to end", weight=2)
def end_a_worker(scene: Scene) -> Faulty:
    send(scene.chooser.choice(scene.tree.worker), signal.SIGTERM)
    yield


@fault("a worker is stopped for a while", hold_s=(1.0, 3.0))
def stop_a_worker(scene: Scene) -> Faulty:
    pid = scene.chooser.choice(scene.tree.worker)
    send(pid, signal.SIGSTOP)
    yield
    send(pid, signal.SIGCONT)


@fault("gunicorn's master is killed", CUT, weight=2)
def kill_the_master(scene: Scene) -> Faulty:
    send(scene.tree.gunicorn[0], signal.SIGKILL)
    yield


@fault("gunicorn's master is told to end", CUT, STOPPING)
def end_the_master(scene: Scene) -> Faulty:
    send(scene.tree.gunicorn[0], signal.SIGTERM)
    yield


@fault("gunicorn's master is stopped for a while", hold_s=(1.0, 3.0))
def stop_the_master(scene: Scene) -> Faulty:
    pid = scene.tree.gunicorn[0]
    send(pid, signal.SIGSTOP)
    yield
    send(pid, signal.SIGCONT)


@fault("the manager is killed", weight=4)
def kill_the_manager(scene: Scene) -> Faulty:
    send(scene.tree.manager[0], signal.SIGKILL)
    yield


@fault("the manager is killed three times")
def kill_the_manager_again(scene: Scene) -> Faulty:
    for _ in range(3):
        kill_one_manager(scene)
        time.sleep(scene.chooser.uniform(0, 0.7))
    yield


def kill_one_manager(scene: Scene) -> None:
    """Kill the manager and wait for the next."""
    before = scene.tree.manager
    if before:
        send(before[0], signal.SIGKILL)
    scene.await_(lambda: scene.tree.manager not in ([], before), "a new manager")


@fault("the manager is killed while a model loads", weight=2)
def kill_the_manager_in_a_load(scene: Scene) -> Faulty:
    scene.judged("operation", "slow-load", operation("slow-load", "unload"))
    scene.beside(lambda: scene.judged("plain", "slow-load", chat("slow-load"), "ok"))
    scene.await_(lambda: scene.machine.servers("starting", model="slow-load"), "a load")
    send(scene.tree.manager[0], signal.SIGKILL)
    yield


@fault("the manager is told to end", CUT, STOPPING)
def end_the_manager(scene: Scene) -> Faulty:
    send(scene.tree.manager[0], signal.SIGTERM)
    yield


@fault("the manager is stopped for a while", hold_s=(1.0, 4.0), weight=2)
def stop_the_manager(scene: Scene) -> Faulty:
    pid = scene.tree.manager[0]
    send(pid, signal.SIGSTOP)
    yield
    send(pid, signal.SIGCONT)


@fault("the manager hangs", "manager_unavailable", hold_s=(20.0, 25.0), weight=0.2)
def hang_the_manager(scene: Scene) -> Faulty:
    pid = scene.tree.manager[0]
    send(pid, signal.SIGSTOP)
    yield
    send(pid, signal.SIGCONT)


@fault("the guard is killed")
def kill_the_guard(scene: Scene) -> Faulty:
    before = scene.tree.guard[0]
    send(before, signal.SIGKILL)
    scene.await_(lambda: scene.tree.guard not in ([], [before]), "a new guard")
    yield


@fault("guard and manager are killed together")
def kill_guard_and_manager(scene: Scene) -> Faulty:
    for pid in [*scene.tree.guard, *scene.tree.manager]:
        send(pid, signal.SIGKILL)
    yield


@fault("both halves are killed together", CUT, weight=2)
def kill_both_halves(scene: Scene) -> Faulty:
    for pid in [*scene.tree.manager, *scene.tree.gunicorn]:
        send(pid, signal.SIGKILL)
    yield


@fault("all workers and the manager are killed together", CUT)
def kill_workers_and_manager(scene: Scene) -> Faulty:
    for pid in [*scene.tree.worker, *scene.tree.manager]:
        send(pid, signal.SIGKILL)
    yield


@fault("serve is killed", NOBODY, STOPPING, "manager_unavailable", weight=0.6)
def kill_serve(scene: Scene) -> Faulty:
    yield from _end_serve(scene, [*scene.tree.serve], signal.SIGKILL)


@fault(
    "serve and the manager are killed",
    NOBODY,
    STOPPING,
    "manager_unavailable",
    weight=0.6,
)
def kill_serve_and_manager(scene: Scene) -> Faulty:
    yield from _end_serve(scene, [*scene.tree.serve, *scene.tree.manager], signal.SIGKILL)


@fault(
    "serve is told to end, and started again",
    NOBODY,
    STOPPING,
    "manager_unavailable",
    weight=0.6,
)
def end_serve(scene: Scene) -> Faulty:
    yield from _end_serve(scene, [*scene.tree.serve], signal.SIGTERM)


@fault("serve is hung up on")
def hang_up_on_serve(scene: Scene) -> Faulty:
    serve = scene.tree.serve
    send(serve[0], signal.SIGHUP)
    yield
    scene.expect(scene.tree.serve == serve, "SIGHUP ended serve")
    if scene.machine.proxy.process is not None and scene.machine.proxy.process.poll() is not None:
        scene.machine.restart()


@fault("the manager is hung up on")
def hang_up_on_the_manager(scene: Scene) -> Faulty:
    manager = scene.tree.manager
    send(manager[0], signal.SIGHUP)
    yield
    scene.expect(scene.tree.manager == manager, "SIGHUP ended the manager")


@fault("a second serve is started on the same state folder")
def second_serve(scene: Scene) -> Faulty:
    before = scene.tree
    command = [sys.executable, "-m", "smartproxy.cli", "serve"]
    config = ["--config", str(scene.machine.proxy.config_path), "--port", str(scene.port + 1)]
    second = subprocess.Popen(
        [*command, *config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = second.communicate(timeout=20)
        scene.expect(second.returncode == EXIT_LOCKED, f"it ended with {second.returncode}: {said}")
    except subprocess.TimeoutExpired:
        second.kill()
        scene.wrong.append("the second serve did not end")
    scene.expect(scene.tree == before, "the first proxy's processes changed")
    yield


def _end_serve(scene: Scene, pids: list[int], number: signal.Signals) -> Faulty:
    """End the whole proxy; nothing of it may be left; start it again."""
    machine = scene.machine
    every = [pid for _role, pid in machine.tree().items()]
    for pid in pids:
        send(pid, number)
    yield
    assert machine.proxy.process is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        machine.proxy.process.wait(60)
    gone = becomes(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in every), within_s=60)
    scene.expect(gone, f"left of it: {[pid for pid in every if os.path.exists(f'/proc/{pid}')]}")
    scene.await_(lambda: not machine.proxy.llama_servers(), "all llama-servers gone")
    machine.start()
