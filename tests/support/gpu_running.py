"""A whole proxy on a machine with GPUs that are not there: the stand-in NVML and llama-servers.

Models are files of real shape with holes for weights, so that estimates and headers are true; what
their servers take of the GPUs is what a test says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.support import gguf_files, gguf_shapes
from tests.support.fakes.nvml import build, environment
from tests.support.fakes.world import FakeGpu, World, WorldFile
from tests.support.running import Proxy, running, wait_until

GIB = 1 << 30
MIB = 1 << 20
#: every layer takes so much, its cache at 2048 tokens included
LAYER_BYTES = 229 * MIB
#: its compute buffer, and what is assumed for the backend on a small card
FIXED_BYTES = 360 * MIB
#: less than its compute buffer: the stand-in tells all it takes as buffers, nothing as overhead,
#: which is learned from
TAKEN_BESIDE_LAYERS_BYTES = 100 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU of a test's machine; its uuid names its place on the bus."""

    gib: float
    used_gib: float = 0.0


def world_of(*cards: Card) -> World:
    """Return a machine with these cards, in PCI and NVML order."""
    return World(
        gpus=tuple(
            FakeGpu(
                uuid=uuid(place),
                total_bytes=int(card.gib * GIB),
                used_bytes=int(card.used_gib * GIB),
                pci_bus_id=f"00000000:{16 * (place + 1):02X}:00.0",
            )
            for place, card in enumerate(cards)
        )
    )


def uuid(place: int) -> str:
    return f"GPU-{place:08d}-aaaa"


def model(folder: Path, name: str, gib: float, **more: Any) -> dict[str, Any]:
    """Write a model of about so many GiB and return its configuration.

    Its server takes a little less than its estimate on the GPUs. more: knobs of the stand-in, and
    keys of the model's configuration by `config`.
    """
    layers = max(2, round((gib * GIB - FIXED_BYTES) / LAYER_BYTES))
    body = gguf_shapes.Body(
        width=4096,
        layers=layers,
        heads=32,
        kv_heads=8,
        head=128,
        inner=14336,
        vocabulary=1024,
        trained=8192,
    )
    shape = gguf_shapes.transformer(f"{name}.Q8_0", "llama", body)
    config = more.pop("config", {})
    knobs = {"gpu_bytes": layers * LAYER_BYTES + TAKEN_BESIDE_LAYERS_BYTES, **more}
    said = ",".join(f"{key}={value}" for key, value in knobs.items())
    path = gguf_files.write(shape, folder)
    return {"path": str(path), "args": ["--fake", said], **config}


@contextmanager
def gpu_machine(
    folder: Path, world: World, models: Mapping[str, Any], **settings: Any
) -> Iterator[tuple[Proxy, WorldFile]]:
    """Run a proxy on this machine, once it has seen the GPUs; yields it and the world to change.

    settings: of the configuration; `env` is more of the proxy's environment.
    """
    file = WorldFile(folder / "world", world)
    env = environment(_library(folder), file) | settings.pop("env", {})
    settings = {"ctx_size": 2048, "min_residency": 0, "gpu_poll_interval": 0.5, **settings}
    with running(folder, models, env=env, **settings) as proxy:
        seen = sum(len(gpu.migs or (gpu,)) for gpu in world.gpus)
        # not by /health, which has the GPUs looked at anew
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM gpus")) == seen, what="GPUs seen")
        yield proxy, file


def _library(folder: Path) -> Path:
    """Return the stand-in NVML library, built once per test session."""
    shared = folder.parent / "nvml-library"
    if not (shared / "libnvidia-ml.so.1").exists():
        own = folder / "nvml-library"
        own.mkdir()
        build(own)
        try:
            own.rename(shared)
        except OSError:  # another test was faster
            return own / "libnvidia-ml.so.1"
    return shared / "libnvidia-ml.so.1"


# --- what a server was started with --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A llama-server as the kernel knows it."""

    argv: list[str]
    env: dict[str, str]

    def flag(self, name: str) -> str | None:
        return self.argv[self.argv.index(name) + 1] if name in self.argv else None

    def cards(self) -> list[str]:
        """Return the uuids of the GPUs that it sees, in its order."""
        return [name for name in self.env["CUDA_VISIBLE_DEVICES"].split(",") if name]


def started(proxy: Proxy, model_id: str) -> Started:
    """Return the live server of a model, read from /proc."""
    (row,) = proxy.rows(
        f"SELECT pid FROM servers WHERE model_id = '{model_id}'"
        " AND state IN ('starting', 'ready', 'draining')"
    )
    process = psutil.Process(row["pid"])
    return Started(argv=process.cmdline(), env=process.environ())


def plan(proxy: Proxy, model_id: str) -> dict[str, Any]:
    """Return what the proxy says would happen to a model."""
    answer = requests.get(f"{proxy.url}/api/models/{model_id}/plan", timeout=60)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def cli_environment(proxy: Proxy) -> dict[str, str]:
    """Return the environment in which `smartproxy` commands mean this proxy."""
    return {**os.environ, "SMARTPROXY_CONFIG": str(proxy.config_path)}
