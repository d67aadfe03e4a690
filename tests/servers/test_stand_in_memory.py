"""The stand-in llama-server takes memory in the world that the stand-in NVML shows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.fakes.nvml.child import Child
from tests.support.fakes.running import STAND_IN, running, wait_for
from tests.support.fakes.world import GIB, WorldFile

BIG, SMALL = "GPU-11111111-aaaa", "GPU-22222222-bbbb"


def visible(*uuids: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}


def test_server_takes_memory_by_tensor_split_and_gives_it_back_when_killed(
    child: Child, world: WorldFile, tmp_path: Path
) -> None:
    env = world.environment | visible(SMALL, BIG)
    options = ["--tensor-split", "1,3", "--fake", f"gpu_bytes={8 * GIB}"]
    with running(tmp_path / "server", *options, environment=env) as server:
        server.wait_ready()
        gpus = child.gpus()
        taken = {uuid: gpus[uuid]["used_bytes"] for uuid in (SMALL, BIG)}
        shown = {
            uuid: [(entry["pid"], entry["used_bytes"]) for entry in gpus[uuid]["processes"]]
            for uuid in (SMALL, BIG)
        }
        assert world.free_bytes() == {uuid: gpus[uuid]["free_bytes"] for uuid in (BIG, SMALL)}
        server.process.kill()
        wait_for(lambda: child.gpus()[BIG]["used_bytes"] == 0, "the memory")  # a zombie has none
    assert taken == {SMALL: 2 * GIB, BIG: 6 * GIB}
    assert shown == {uuid: [(server.process.pid, taken[uuid])] for uuid in (SMALL, BIG)}


def test_server_that_finds_too_little_dies_of_out_of_memory(
    child: Child, world: WorldFile, tmp_path: Path
) -> None:
    world.change_gpu(SMALL, used_bytes=GIB)
    env = world.environment | visible(BIG, SMALL)
    options = ["--fake", f"gpu_bytes={GIB}/{7 * GIB + 1}"]
    with running(tmp_path / "server", *options, environment=env) as server:
        assert server.end() == 1
        log = server.log.read_text()
    assert "on device 1: cudaMalloc failed: out of memory" in log
    assert "unable to allocate CUDA1 buffer" in log
    assert child.gpus()[BIG]["used_bytes"] == 0


def test_memory_comes_step_by_step_and_goes_with_a_lag(
    child: Child, world: WorldFile, tmp_path: Path
) -> None:
    env = world.environment | visible(BIG)
    knobs = f"gpu_bytes={4 * GIB},gpu_steps=4,load_s=4,free_lag_s=1"
    with running(tmp_path / "server", "--fake", knobs, environment=env) as server:
        seen = set()
        while server.status() != 200:
            seen.add(child.gpus()[BIG]["used_bytes"] // GIB)
        assert {1, 2, 3} <= seen
        server.terminate()
        assert server.end() == 0
        held = child.gpus()[BIG]
        assert (held["used_bytes"], held["processes"]) == (4 * GIB, [])
        wait_for(lambda: child.gpus()[BIG]["used_bytes"] == 0, "the memory")


def test_two_servers_cannot_both_have_the_last_bytes(world: WorldFile, tmp_path: Path) -> None:
    env = world.environment | visible(SMALL)
    knobs = ["--fake", f"gpu_bytes={5 * GIB}"]
    with (
        running(tmp_path / "one", *knobs, environment=env) as one,
        running(tmp_path / "two", *knobs, environment=env) as two,
    ):
        both = [one, two]
        wait_for(lambda: [s.process.poll() for s in both].count(1) == 1, "one to fail")
        next(server for server in both if server.process.poll() is None).wait_ready()


def test_request_over_the_memory_crashes_a_running_server(world: WorldFile, tmp_path: Path) -> None:
    env = world.environment | visible(SMALL)
    knobs = f"gpu_bytes={7 * GIB},gpu_request_bytes={2 * GIB},crash=oom"
    with running(tmp_path / "server", "--fake", knobs, environment=env) as server:
        with pytest.raises(OSError, match=r"."):
            server.wait_ready().post("/v1/completions", {"prompt": "a"})
        assert server.end() < 0
        assert "CUDA error: out of memory" in server.log.read_text()


@pytest.mark.parametrize("options", [["--n-gpu-layers", "0"], ["--device", "none"]])
def test_server_on_the_cpu_takes_nothing(
    world: WorldFile, tmp_path: Path, options: list[str]
) -> None:
    knobs = ["--fake", f"gpu_bytes={100 * GIB}"]
    with running(tmp_path / "s", *options, *knobs, environment=world.environment) as server:
        server.wait_ready()
        assert world.free_bytes() == {BIG: 24 * GIB, SMALL: 8 * GIB}


def test_device_list_follows_what_is_visible(world: WorldFile) -> None:

    def lines(env: dict[str, str]) -> list[str]:
        whole = os.environ | world.environment | env
        done = subprocess.run(
            [STAND_IN, "--list-devices"], capture_output=True, env=whole, text=True
        )
        return done.stdout.splitlines()

    assert lines(visible(SMALL)) == [
        "Available devices:",
        "  CUDA0: NVIDIA GeForce RTX 3070 (8192 MiB, 8192 MiB free)",
    ]
    assert lines(visible("")) == ["Available devices:", "  (none)"]
    world.change(backend="Vulkan")
    assert [line.split(":")[0] for line in lines(visible(SMALL))[1:]] == ["  Vulkan0", "  Vulkan1"]
