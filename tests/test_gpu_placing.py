"""Models on GPUs, end to end: the stand-in NVML, stand-in servers, command lines from /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_running import Card, gpu_machine, model, plan, started, uuid, world_of

pytestmark = pytest.mark.servers


def test_a_model_goes_where_the_plan_said_on_one_of_two_unequal_cards(tmp_path: Path) -> None:
    models = {"big": model(tmp_path, "big", 12), "small": model(tmp_path, "small", 5)}
    with gpu_machine(tmp_path, world_of(Card(gib=8), Card(gib=24)), models) as (proxy, _):
        told = plan(proxy, "big")
        assert [gpu["id"] for gpu in told["placement"]["gpus"]] == [1]
        assert [gpu["fits"] for gpu in told["candidates"]] == [False, True]
        assert "too small for the whole model" in told["candidates"][0]["note"]
        assert proxy.llama_servers() == []

        assert proxy.chat("big").status_code == 200
        server = started(proxy, "big")
        assert server.cards() == [uuid(1)]
        assert server.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert server.flag("--split-mode") == "none"
        assert plan(proxy, "big")["action"] == "loaded"

        # 12 of 24 GB are left there, 8 here: the roomier one again
        assert proxy.chat("small").status_code == 200
        assert started(proxy, "small").cards() == [uuid(1)]
