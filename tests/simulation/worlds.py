"""What users configured, for the seeds to choose from; and a state file to begin with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from smartproxy.catalog.live import Live
from smartproxy.config.load import load_settings
from smartproxy.llama.binary import Binary
from smartproxy.manager.served import loaded_of
from smartproxy.state import migrate
from smartproxy.types import GIB
from tests.simulation.processes import Configured
from tests.support.gguf_files import write
from tests.support.gguf_shapes import Body, transformer

TINY = Body(width=256, layers=2, heads=4, kv_heads=4, head=64, inner=512, vocabulary=256)
#: waits are short, save for the one that would end a request that nobody answers
SETTINGS = {
    "queue_timeout": 3,
    "load_timeout": 1800,
    "load_stall_timeout": 4,
    "min_residency": 0.3,
    "gpu_poll_interval": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A configuration on a machine, and the state file after a first start."""

    configured: Configured
    #: bytes of each GPU
    gpus: Sequence[int]
    model_bytes: Mapping[str, int]
    #: with what the state file says after a first start
    template: sqlite3.Connection


#: GB of the GPUs, GB of the models, more settings, more settings of models
SPECS: tuple[tuple[list[float], dict[str, float], dict[str, Any], dict[str, Any]], ...] = (
    ([8], {"a": 3, "b": 3, "c": 5}, {"server_pool": {"size": 3}}, {}),
    ([8, 6], {"a": 5, "b": 5, "c": 3}, {"server_pool": {"size": 2}}, {"a": {"ttl": 1}}),
    ([], {"a": 1, "b": 1}, {"server_pool": {"size": 1}}, {}),
    ([8], {"a": 3, "b": 5}, {"server_pool": {"size": 2}, "max_queue": 3}, {"b": {"preload": True}}),
)


@cache
def folder() -> Path:
    """Return the folder of this process: in memory where the system has such a place."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="smartproxy-simulation-", dir=where))


@cache
def world(number: int) -> World:
    """Return one of the worlds; made once."""
    gpus, models, settings, of_models = SPECS[number]
    home = folder() / str(number)
    home.mkdir()
    model_path = write(transformer("tiny.Q4_K_M", "llama", TINY), home)
    config = {
        **SETTINGS,
        **settings,
        "llama_server": "/bin/sh",
        "server_pool": {**settings["server_pool"], "port_start": 20_000},
        "models": {
            name: {"path": str(model_path), "estimated_vram": size, **of_models.get(name, {})}
            for name, size in models.items()
        },
    }
    path = home / "config.json"
    path.write_text(json.dumps(config))
    loaded = load_settings(path)
    live = Live(loaded)
    configured = Configured(
        live=live,
        binary=Binary(
            path=Path("/bin/sh"),
            flags=frozenset(),
            build="simulated",
            library_dir=None,
            trace_verbosity=None,
            devices=(),
        ),
    )
    store, _ = migrate.create(loaded.state_dir / "state.db")
    for spec in live.catalog.models.values():
        loaded_of(store, spec)  # headers are read once
    store.close_all()
    (loaded.state_dir / "logs").mkdir(exist_ok=True)
    template = sqlite3.connect(":memory:")
    with contextlib.closing(sqlite3.connect(store.path)) as file:
        file.execute("PRAGMA journal_mode = DELETE")  # a database in memory has no WAL
        file.backup(template)
    return World(
        configured=configured,
        gpus=[int(size * GIB) for size in gpus],
        model_bytes={name: int(size * GIB) for name, size in models.items()},
        template=template,
    )


def forget() -> None:
    """Delete this process's folder."""
    shutil.rmtree(folder(), ignore_errors=True)
    world.cache_clear()
    folder.cache_clear()
