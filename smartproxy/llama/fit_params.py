"""llama.cpp's own tool for what a model takes: it reads the header and tells MiB per device.

It allocates no buffers, and charges a little more than a server takes: logits of a whole batch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.lifetime import tethered
from smartproxy.llama.binary import Binary, child_environment, flags_in
from smartproxy.llama.command import device_flags, memory_flags
from smartproxy.memory.types import EstimateOptions
from smartproxy.planner.types import Placement
from smartproxy.types import MIB

NAME = "llama-fit-params"
DEADLINE_S = 60.0
#: how soon the end of the manager ends it
LOOK_EVERY_S = 0.02
#: "CUDA0 4685 1024 258": weights, caches, graph, each rounded down
_LINE = re.compile(r"^(\w+) (\d+) (\d+) (\d+)\s*$", re.M)
_ROUNDING_BYTES = 3 * MIB


class NoAnswer(Exception):
    """The tool could not be run, or told nothing of use."""


def is_there(binary: Binary) -> bool:
    """Return whether the build has the tool beside its server."""
    return os.access(binary.path.parent / NAME, os.X_OK)


def device_bytes(
    binary: Binary,
    spec: ModelSpec,
    placement: Placement,
    options: EstimateOptions,
    stopping: threading.Event,
) -> tuple[int, ...]:
    """Return bytes per device of a placement, the host last. Blocks up to 2 minutes.

    stopping: ends the tool and the wait for it. Raises NoAnswer.
    """
    flags = [
        *("--ctx-size", str(placement.layout.context_size), "--parallel", str(spec.parallel)),
        "--kv-unified" if spec.kv_unified else "--no-kv-unified",
        *memory_flags(options),
        *device_flags(placement),
    ]
    env = child_environment(os.environ, binary.library_dir)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env["CUDA_VISIBLE_DEVICES"] = ",".join(share.uuid for share in placement.gpus)
    env.update(spec.env)
    tool = binary.path.parent / NAME
    offered = flags_in(_run(tool, env, ["--help"], stopping))
    arguments = ["--model", str(spec.path), *_only(offered, flags), "--fit-print", "on"]
    output = _run(tool, env, arguments, stopping)
    sizes = [sum(map(int, parts)) * MIB + _ROUNDING_BYTES for _, *parts in _LINE.findall(output)]
    if len(sizes) != len(placement.gpus) + 1:
        raise NoAnswer(f"{NAME} told nothing of use: {output[-500:]}")
    return tuple(sizes)


def _run(
    tool: Path, env: dict[str, str], arguments: Iterable[str], stopping: threading.Event
) -> str:
    try:
        process = subprocess.Popen(
            tethered([str(tool), *arguments]),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NoAnswer(f"{NAME} could not be asked: {error}") from None
    with process:
        try:
            output, complaint = _outputs(process, stopping)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            why = "the manager ends" if stopping.is_set() else f"no answer within {DEADLINE_S:g} s"
            raise NoAnswer(f"{NAME} was ended: {why}") from None
    if process.returncode:
        raise NoAnswer(
            f"{NAME} could not be asked: exit code {process.returncode}: {complaint[-300:]}"
        )
    return output


def _outputs(process: subprocess.Popen[str], stopping: threading.Event) -> tuple[str, str]:
    """Return what it wrote. Raises TimeoutExpired at the deadline, and when the manager ends."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return process.communicate(timeout=LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            if stopping.is_set() or time.monotonic() > deadline:
                raise


def _only(offered: frozenset[str], flags: list[str]) -> list[str]:
    """Return the flags, with their values, that the tool has."""
    kept: list[str] = []
    keep = False
    for word in flags:
        keep = word in offered if word.startswith("--") else keep
        if keep:
            kept.append(word)
    return kept
