"""The life of the stand-in: its log lines, loading, crashing, signals, the end."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time

from tests.support.fakes.stand_in.engine import Engine
from tests.support.fakes.stand_in.journal import Journal
from tests.support.fakes.stand_in.knobs import Knobs
from tests.support.fakes.stand_in.memory import MIB, GpuMemory, OutOfMemory

_STARTED = time.monotonic()


def log(level: str, text: str) -> None:
    """Write one line to stderr as llama-server does: time since the start, level, text."""
    micro = int((time.monotonic() - _STARTED) * 1e6)
    seconds, rest = divmod(micro, 1_000_000)
    stamp = f"{seconds // 60}.{seconds % 60:02}.{rest // 1000:03}.{rest % 1000:03}"
    os.write(2, f"{stamp} {level} {text}\n".encode())


def leave(journal: Journal, status: int) -> None:
    """End the process now, whatever its threads do."""
    journal.write("exit", status=status)
    sys.stdout.flush()
    os._exit(status)


def crash(knobs: Knobs, journal: Journal) -> None:
    """Die as knobs.crash says; does not return."""
    journal.write("crash", how=knobs.crash)
    if knobs.crash == "exit":
        os._exit(1)
    if knobs.crash == "oom":
        os.write(2, b"CUDA error: out of memory\n  current device: 0, in function alloc\n")
    elif knobs.crash == "abort":
        os.write(2, b"ggml.c:1234: GGML_ASSERT(told to crash) failed\n")
    name = {"segv": signal.SIGSEGV, "kill": signal.SIGKILL}.get(knobs.crash, signal.SIGABRT)
    os.kill(os.getpid(), name)
    time.sleep(60)  # the signal may reach another thread first


# --- loading -------------------------------------------------------------------------------------


def load(knobs: Knobs, memory: GpuMemory, journal: Journal, verbose: bool) -> None:
    """Take load_s, showing progress and taking memory step by step; ends the process on failure."""
    if knobs.silent_load and knobs.misbehaves():
        threading.Event().wait()
    parts = max(knobs.gpu_steps, min(50, int(knobs.load_s / 0.1)), 1)
    taken = 0
    try:
        for part in range(parts):
            step = part * knobs.gpu_steps // parts + 1
            if step > taken:
                memory.take_step(step)
                taken = step
            _pass_time(knobs, knobs.load_s / parts)
            if knobs.progress == "log" and knobs.load_s > 0:
                log("I", f"load_tensors: loaded {part + 1} of {parts} parts")
    except OutOfMemory as error:
        _fail(journal, _out_of_memory_lines(error.index, error.name, error.asked_bytes, "model"))
    if knobs.fail_load and knobs.misbehaves():
        _fail_as_told(knobs, journal)
    if verbose:
        _show_buffers(memory)


def _pass_time(knobs: Knobs, seconds: float) -> None:
    """Sleep, or with progress=cpu sleep nine tenths and compute one."""
    if knobs.progress != "cpu":
        time.sleep(seconds)
        return
    time.sleep(seconds * 0.9)
    end = time.thread_time() + seconds * 0.1
    while time.thread_time() < end:
        pass


def _show_buffers(memory: GpuMemory) -> None:
    """What -lv 4 tells of the buffers: the server's part of each GPU, less the backend's own."""
    log("I", f"load_tensors: offloaded {len(memory.devices) * 31}/31 layers to GPU")
    for device, share in zip(memory.devices, memory.shares(), strict=True):
        if not share:
            continue  # a test that says nothing of memory is told nothing
        buffers = max(0, share - memory.knobs.gpu_overhead_bytes) / MIB
        model, cache = round(buffers * 0.8, 2), round(buffers * 0.15, 2)
        rest = buffers - model - cache
        log("I", f"load_tensors: {device.name:>12} model buffer size = {model:8.2f} MiB")
        log("I", f"llama_kv_cache: {device.name:>10} KV buffer size = {cache:8.2f} MiB")
        log("I", f"sched_reserve: {device.name:>10} compute buffer size = {rest:8.2f} MiB")
    if memory.knobs.host_bytes:
        host = memory.knobs.host_bytes / MIB
        log("I", f"load_tensors:   CPU_Mapped model buffer size = {host:8.2f} MiB")


def _fail_as_told(knobs: Knobs, journal: Journal) -> None:
    what = knobs.fail_load
    if what == "abort":
        crash(knobs, journal)
    error = "llama_model_load: error loading model: "
    known = {
        "bad_model": [
            error + "tensor 'blk.1.ffn_up.weight' data is not within the file bounds, "
            "model is corrupted or incomplete"
        ],
        "arch": [error + "unknown model architecture: 'nonesuch'"],
        "fit": ["common_fit_params: failed to fit params to free device memory"],
        "oom": _out_of_memory_lines(0, "CUDA0", 5000 * MIB, "model"),
        "oom_kv": _out_of_memory_lines(0, "CUDA0", 700 * MIB, "kv"),
        "oom_compute": _out_of_memory_lines(0, "CUDA0", 300 * MIB, "compute"),
    }
    _fail(journal, known.get(what, [error + what]))


def _out_of_memory_lines(index: int, name: str, asked_bytes: int, which: str) -> list[str]:
    """Return the lines of ggml-cuda and of who asked it, as in llama.cpp's source."""
    size = f"{asked_bytes / MIB:.2f} MiB on device {index}"
    lines = [
        f"ggml_backend_cuda_buffer_type_alloc_buffer: allocating {size}: "
        "cudaMalloc failed: out of memory"
    ]
    if which == "model":
        return [*lines, f"llama_model_load: error loading model: unable to allocate {name} buffer"]
    who = {
        "kv": "llama_init_from_model: failed to initialize the context: "
        "failed to allocate buffer for kv cache",
        "compute": "llama_init_from_model: failed to initialize the context: "
        "failed to allocate compute pp buffers",
    }[which]
    return [*lines, who, "common_init_: failed to create context with model"]


def fail_to_load(journal: Journal, lines: list[str]) -> None:
    """End as the real one does after a failed load: the reason, then always the same end."""
    _fail(journal, lines)


def _fail(journal: Journal, lines: list[str]) -> None:
    for line in lines:
        log("E", line)
    log("E", "srv    load_model: failed to load model")
    log("I", "srv    operator(): operator(): cleaning up before exit...")
    log("E", "srv  llama_server: exiting due to model loading error")
    leave(journal, 1)


# --- signals -------------------------------------------------------------------------------------


class Signals:
    """SIGTERM and SIGINT as the real server takes them: the first ends it, the second at once."""

    def __init__(self, knobs: Knobs, journal: Journal) -> None:
        self._knobs = knobs
        self._journal = journal
        self._ignored = 0
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take the signals over; before that (while loading) they kill, as with the real one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self._journal.write("signal", signal=signal.Signals(number).name)
        if self._ignored < self._knobs.ignore_term:
            self._ignored += 1
            return
        self._arrived.put(number)

    def wait(self) -> None:
        """Return when the first signal that counts has come."""
        self._arrived.get()

    def end(self, engine: Engine) -> int:
        """Return the exit status of a server that was told to stop, after the time it takes."""
        log("I", "srv    operator(): operator(): cleaning up before exit...")
        busy = engine.in_flight()
        engine.stopping.set()
        try:
            self._arrived.get(timeout=self._knobs.term_hang_s if busy else self._knobs.slow_exit_s)
        except queue.Empty:
            return 0
        os.write(2, b"Received second interrupt, terminating immediately.\n")
        return 1
