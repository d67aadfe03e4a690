"""The planner's split carried out by the real llama-server, over two ggml-rpc-servers on loopback.

NVML (the stand-in) shows two small cards; llama-server has two RPC devices in their place. What the
server says it allocated on each is held against what was promised of each card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from smartproxy.llama.buffer_lines import measured_buffers
from smartproxy.memory.estimate import estimate
from smartproxy.memory.types import DeviceBytes, EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.metadata import read_metadata
from smartproxy.types import MIB
from tests.real.test_estimate_live import assert_exact, binary, process, wait_until_open
from tests.support.gpu_running import Card, gpu_machine, plan, started, world_of
from tests.support.ports import free_port
from tests.support.running import REAL_MODEL

CONTEXT = 8192


@pytest.fixture
def endpoints(tmp_path: Path) -> Iterator[list[str]]:
    """Two devices that are no GPUs but take weights and compute like some."""
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        for port in ports:
            command = [binary("ggml-rpc-server"), "-p", str(port)]
            stack.enter_context(process(command, tmp_path / f"rpc-{port}.log"))
        for port in ports:
            wait_until_open(port)
        yield [f"127.0.0.1:{port}" for port in ports]


def test_each_device_takes_the_part_that_was_planned_for_it(
    tmp_path: Path, endpoints: list[str]
) -> None:
    models = {"m": {"path": str(REAL_MODEL), "args": ["--rpc", ",".join(endpoints)]}}
    models["m"]["allow_dangerous_args"] = True
    settings = {"gpu_headroom_mb": 64, "ctx_size": CONTEXT}
    # with 270 MB for the backend and 64 MB headroom, neither has room for all of it
    cards = world_of(Card(gib=640 / 1024), Card(gib=530 / 1024))
    with gpu_machine(tmp_path, cards, models, real=True, **settings) as (proxy, _):
        told = plan(proxy, "m")
        planned = told["placement"]
        assert planned is not None, told
        assert [gpu["id"] for gpu in planned["gpus"]] == [0, 1]
        answer = proxy.chat("m")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]

        (row,) = proxy.rows("SELECT * FROM servers")
        split = started(proxy, "m").flag("--tensor-split")
        assert split == row["tensor_split"]
        assert split == ",".join(f"{share:g}" for share in planned["tensor_split"])
        promised = proxy.rows("SELECT estimated_bytes FROM assignments ORDER BY rowid")
        log = Path(row["log_path"]).read_text(errors="replace")
    measured = [
        next(found for name, found in measured_buffers(log.splitlines()).items() if end in name)
        for end in endpoints
    ]
    predicted = predictions(row["tensor_split"])
    for device, found, part in zip(predicted, measured, promised, strict=True):
        assert_exact(device, found)
        assert device.compute_bytes >= found.compute_bytes
        assert found.buffers_bytes < part["estimated_bytes"] - 200 * MIB
    # the shares differ, as the rooms do
    assert measured[0].kv_cache_bytes > measured[1].kv_cache_bytes > 10 * MIB


def predictions(split: str) -> tuple[DeviceBytes, ...]:
    options = EstimateOptions(parallel=4, kv_unified=True, flash_attn=FlashAttention.ON)
    shares = tuple(float(share) for share in split.split(","))
    layout = Layout(tensor_split=shares, gpu_layers=31, context_size=CONTEXT)
    return estimate(read_metadata(REAL_MODEL), options, layout).devices
