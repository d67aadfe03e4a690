"""A whole proxy on four unequal GPUs that are not there, with models of good and of bad manners.

Its state folder is a small file system of its own where that can be had, so that it can be full,
and its wall clock can be set. A manner that a fault calls for is armed by removing a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import WorldFile
from tests.support.gpu_running import GIB, Card, model, world_of
from tests.support.ports import free_pool
from tests.support.process_tree import Tree, tree_of
from tests.support.running import Proxy

CARDS = (Card(gib=8), Card(gib=8, used_gib=1), Card(gib=16), Card(gib=24))
HEADROOM_BYTES = 256 << 20
#: small ones that the load asks most, larger ones that make each other room; GiB
HOME = {"home-1": 3.0, "home-2": 3.0, "home-3": 4.0}
OTHERS = {"other-1": 5.0, "other-2": 6.0, "other-3": 12.0, "large": 22.0, "split": 30.0}
#: what is loaded and unloaded all the time to see that loads happen: on the CPU, so that no GPU
#: is to blame
CANARY = "canary"
#: models with a manner that happens once after it is armed; the knobs of the stand-in
ARMED: dict[str, dict[str, Any]] = {
    "silent": {"silent_load": 1},
    "oom-once": {"fail_load": "oom"},
    "oom-kv-once": {"fail_load": "oom_kv"},
    "bad-once": {"fail_load": "bad_model"},
    "aborts-loading": {"load_s": 0.3, "fail_load": "abort"},
    "dies-ready": {"crash_after_ready_s": 0.3},
    "dies-at-request": {"crash_on_request": 1},
    "dies-mid-stream": {"crash_mid_stream": 3},
    "segv-at-request": {"crash_on_request": 1, "crash": "segv"},
    "cuda-oom-at-request": {"crash_on_request": 1, "crash": "oom"},
    "hangs-at-request": {"hang_on_request": 1},
}
#: models whose manner is for good
MANNERED: dict[str, dict[str, Any]] = {
    "ignores-term": {"ignore_term": 99},
    "slow-exit": {"slow_exit_s": 1.5},
    "slow-load": {"load_s": 2.0},
    "one-thread": {"http_threads": 1},
    "lags": {"free_lag_s": 1.0},
    "bad-answers": {},
}
SETTINGS: dict[str, Any] = {
    "min_residency": 0,
    "queue_timeout": 50,
    "load_timeout": 15,
    "load_stall_timeout": 3,
    "request_timeout": 6,
    "max_body_mb": 8,
    "max_queue": 200,
    "sse_wait_comment_after": 2,
}
STATE_MB = 64
CLOCK = Path(__file__).parent / "clock.c"


class Machine:
    """The proxy, its world and its files; started by `machine()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.armed = folder / "armed"
        self.armed.mkdir()
        self.models_dir = folder / "found"
        self.models_dir.mkdir()
        self.state_dir = folder / "state"
        self.state_dir.mkdir(mode=0o700)
        self.state_is_small = self._mount()
        self._clock = folder / "clock"
        self._clock.write_bytes(struct.pack("d", 0.0))
        self.world = WorldFile(folder / "world", world_of(*CARDS))
        pool = {"size": 8, "port_start": free_pool(8)}
        self.ports = range(pool["port_start"], pool["port_start"] + pool["size"] + 16)
        self.proxy = Proxy(
            folder,
            self._models(),
            env=self._environment(),
            server_pool=pool,
            models_dir=str(self.models_dir),
            ctx_size=2048,
            gpu_poll_interval=0.5,
            **SETTINGS,
        )
        self.port = self.proxy.port

    def _models(self) -> dict[str, Any]:
        def make(name: str, gib: float, **knobs: Any) -> dict[str, Any]:
            return model(self.folder, name, gib, life_s=7200, **knobs)

        models = {name: make(name, gib, load_s=0.1) for name, gib in HOME.items()}
        models |= {
            name: make(name, gib, load_s=0.4, gpu_steps=4, free_lag_s=0.2)
            for name, gib in OTHERS.items()
        }
        models |= {name: make(name, 2.0, **knobs) for name, knobs in MANNERED.items()}
        for name, knobs in ARMED.items():
            self.disarm(name)
            models[name] = make(name, 2.0, once=self.armed / name, **knobs)
        models[CANARY] = {**make(CANARY, 1.0, gpu_bytes=0), "cpu": True}
        return models

    def _environment(self) -> dict[str, str]:
        preload = self.folder / "clock.so"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(preload), str(CLOCK), "-ldl"]
        subprocess.run(command, check=True)
        clock = {"LD_PRELOAD": str(preload), "CHAOS_CLOCK": str(self._clock)}
        return environment(build(self.folder), self.world) | clock

    def _mount(self) -> bool:
        """Give the state folder a small file system of its own; False where that is not allowed."""
        options = f"size={STATE_MB}m,mode=700"
        mount = shutil.which("mount")
        argv = [mount or "mount", "-t", "tmpfs", "-o", options, "chaos", str(self.state_dir)]
        return bool(mount) and subprocess.run(argv, capture_output=True).returncode == 0

    # what faults change

    def arm(self, name: str) -> None:
        """Have a model of ARMED misbehave once."""
        (self.armed / name).unlink(missing_ok=True)

    def disarm(self, name: str) -> None:
        (self.armed / name).touch()

    def set_clock(self, seconds: float) -> None:
        """Put the proxy's wall clock so many seconds ahead of the true time."""
        with self._clock.open("r+b") as file:
            file.write(struct.pack("d", seconds))

    # what is there

    def tree(self) -> Tree:
        """Return the proxy's own processes."""
        process = self.proxy.process
        return Tree() if process is None else tree_of(process.pid)

    def servers(self, *states: str, model: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of servers in these states, all live ones by default."""
        wanted = states or ("starting", "ready", "draining", "stopping")
        listed = ", ".join(f"'{state}'" for state in wanted)
        rows = self.proxy.rows(f"SELECT * FROM servers WHERE state IN ({listed})")
        return [row for row in rows if model in (None, row["model_id"])]

    def full_bytes(self) -> dict[str, int]:
        """Return what may be promised of each GPU at most, by uuid."""
        gpus = world_of(*CARDS).gpus
        return {gpu.uuid: gpu.total_bytes - gpu.used_bytes - HEADROOM_BYTES for gpu in gpus}

    # its life

    def start(self) -> None:
        self.proxy.start()

    def restart(self) -> None:
        """Start it anew, whatever is left of it; the state file stays."""
        self.end()
        self.start()

    def start_over(self) -> None:
        """Start it anew with nothing of its past."""
        self.end()
        for entry in self.state_dir.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.set_clock(0.0)
        self.world.write(world_of(*CARDS))
        for name in ARMED:
            self.disarm(name)
        self.start()

    def end(self) -> None:
        """End all that is there, in order if it can be, by force if not."""
        pids = [pid for _role, pid in self.tree().items()]
        for pid in pids:
            send(pid, signal.SIGCONT)
        process = self.proxy.process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(50)
        for pid in pids:
            send(pid, signal.SIGKILL)
        if process is not None:
            process.wait()
        for left in self.proxy.llama_servers():
            with contextlib.suppress(Exception):
                left.kill()

    def close(self) -> None:
        self.end()
        if self.state_is_small:
            subprocess.run(["umount", "-l", str(self.state_dir)], check=False)


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Run the proxy for the length of a block."""
    made = Machine(folder)
    try:
        made.start()
        yield made
    finally:
        made.close()


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal to a process of ours; False: it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def becomes(condition: Callable[[], Any], *, within_s: float) -> bool:
    """Wait until a condition holds; an exception counts as no. Returns whether it came to hold."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(Exception):
            if condition():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


__all__ = ["GIB", "Machine", "becomes", "machine", "send"]
