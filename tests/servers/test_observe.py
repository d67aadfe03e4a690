"""What the manager sees of GPUs: the real nvidia-ml-py over the stand-in NVML library.

Each test has a child of its own (support/fakes/nvml/look.py), because a process loads NVML once,
and changes the world under it.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.support.fakes import world as nvml
from tests.support.fakes.nvml import environment
from tests.support.fakes.nvml.child import Child
from tests.support.fakes.running import wait_for
from tests.support.fakes.world import GIB, FakeGpu, FakeMig, FakeProcess, Fault, World, WorldFile

MIB = 1 << 20
BIG, SMALL = "GPU-11111111-aaaa", "GPU-22222222-bbbb"


def test_two_unequal_cards_are_listed_with_all_that_is_known(
    child: Child, world: WorldFile
) -> None:
    world.change_gpu(
        SMALL,
        used_bytes=3 * GIB,
        reserved_bytes=GIB // 2,
        utilization=37,
        temperature_c=66,
        power_w=123.5,
    )
    snapshot = child.look()
    big, small = snapshot["gpus"]
    assert (snapshot["reason"], snapshot["driver_version"]) == (None, "580.95.05")
    assert [gpu["index"] for gpu in (big, small)] == [0, 1]
    assert [gpu["uuid"] for gpu in (big, small)] == [BIG, SMALL]
    assert (big["total_bytes"], big["free_bytes"]) == (24 * GIB, 24 * GIB)
    assert small == {
        "index": 1,
        "uuid": SMALL,
        "name": "NVIDIA GeForce RTX 3070",
        "pci_bus_id": "00000000:41:00.0",
        "total_bytes": 8 * GIB,
        "free_bytes": 4 * GIB + GIB // 2,
        "used_bytes": 3 * GIB,
        "utilization": 37.0,
        "temperature_c": 66.0,
        "power_w": 123.5,
        "compute_capability": "8.6",
        "mig": False,
        "processes": [],
        "error": None,
        "lost": False,
    }


def test_memory_that_changes_shows_on_the_next_look(child: Child, world: WorldFile) -> None:
    before = child.gpus()[BIG]["free_bytes"]
    world.change_gpu(BIG, used_bytes=5 * GIB)
    assert child.gpus()[BIG]["free_bytes"] == before - 5 * GIB


def test_eight_cards_keep_nvml_order(child: Child, world: WorldFile) -> None:
    uuids = [f"GPU-{number}" for number in (5, 3, 7, 1, 0, 2, 6, 4)]
    cards = [
        FakeGpu(uuid=uuid, pci_bus_id=f"00000000:{16 + place:02X}:00.0")
        for place, uuid in enumerate(uuids)
    ]
    world.write(World(gpus=tuple(cards)))
    seen = child.look()["gpus"]
    assert [gpu["uuid"] for gpu in seen] == uuids
    assert [gpu["index"] for gpu in seen] == list(range(8))


@pytest.mark.parametrize(
    ("function", "field", "value"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w", None),
        ("nvmlDeviceGetTemperature", "temperature_c", None),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability", None),
        ("nvmlDeviceGetUtilizationRates", "utilization", 0.0),
        ("nvmlDeviceGetPciInfo_v3", "pci_bus_id", ""),
    ],
)
@pytest.mark.parametrize("code", [nvml.NOT_SUPPORTED, nvml.NO_PERMISSION, nvml.UNKNOWN])
def test_card_without_a_reading_lacks_only_that(
    child: Child, world: WorldFile, function: str, field: str, value: object, code: int
) -> None:
    whole = child.gpus()
    world.change(faults=(Fault(function=function, code=code, uuid=SMALL),))
    assert child.gpus() == whole | {SMALL: whole[SMALL] | {field: value}}


def test_lost_card_keeps_its_numbers_and_leaves_the_other_alone(
    child: Child, world: WorldFile
) -> None:
    world.change_gpu(SMALL, used_bytes=GIB)
    before = child.gpus()
    world.change_gpu(SMALL, lost=True)
    world.change_gpu(BIG, used_bytes=2 * GIB)
    after = child.gpus()
    assert "lost" in after[SMALL]["error"].lower()
    assert after[SMALL] == before[SMALL] | {"error": after[SMALL]["error"], "lost": True}
    assert (after[BIG]["error"], after[BIG]["used_bytes"]) == (None, 2 * GIB)


def test_lost_card_that_returns_needs_nvml_anew_and_gets_it(child: Child, world: WorldFile) -> None:
    child.look()
    world.change_gpu(SMALL, lost=True)
    child.look()
    world.change_gpu(SMALL, lost=False, used_bytes=GIB)
    assert child.gpus()[SMALL]["error"] is not None  # NVML itself says so until initialised again
    snapshot = child.look_later()
    small = next(gpu for gpu in snapshot["gpus"] if gpu["uuid"] == SMALL)
    assert (small["error"], small["used_bytes"]) == (None, GIB)


def test_card_that_falls_off_the_bus_stays_listed_and_the_rest_keep_their_index(
    child: Child, world: WorldFile
) -> None:
    child.look()
    big, small = world.world.gpus
    world.change(gpus=(small,))
    child.look()
    snapshot = child.look_later()
    assert [(gpu["index"], gpu["uuid"]) for gpu in snapshot["gpus"]] == [(0, BIG), (1, SMALL)]
    assert [bool(gpu["error"]) for gpu in snapshot["gpus"]] == [True, False]
    world.change(gpus=(big, small))
    snapshot = child.look_later()
    assert [(gpu["index"], gpu["uuid"]) for gpu in snapshot["gpus"]] == [(0, BIG), (1, SMALL)]
    assert [gpu["error"] for gpu in snapshot["gpus"]] == [None, None]


def test_new_card_does_not_get_the_index_of_one_that_has_gone(
    child: Child, world: WorldFile
) -> None:
    child.look()
    world.change_gpu(BIG, lost=True)
    child.look()
    world.change(gpus=(FakeGpu(uuid="GPU-new"), world.world.gpus[1]))
    snapshot = child.look_later()
    indices = {gpu["uuid"]: gpu["index"] for gpu in snapshot["gpus"]}
    assert indices == {BIG: 0, SMALL: 1, "GPU-new": 2}


def test_card_lost_between_two_questions_is_in_error(child: Child, world: WorldFile) -> None:
    child.look()
    fault = Fault(function="nvmlDeviceGetPowerUsage", code=nvml.GPU_IS_LOST, uuid=BIG)
    world.change(faults=(fault,))
    gpus = child.gpus()
    assert (bool(gpus[BIG]["error"]), gpus[SMALL]["error"]) == (True, None)


def test_card_whose_memory_cannot_be_read_is_in_error(child: Child, world: WorldFile) -> None:
    child.look()
    fault = Fault(function="nvmlDeviceGetMemoryInfo_v2", code=nvml.UNKNOWN, uuid=BIG)
    world.change(faults=(fault,))
    gpus = child.gpus()
    assert (bool(gpus[BIG]["error"]), gpus[SMALL]["error"]) == (True, None)


def test_card_that_never_could_be_read_is_told_in_the_reason(
    child: Child, world: WorldFile
) -> None:
    world.change_gpu(BIG, lost=True)
    snapshot = child.look()
    assert [gpu["uuid"] for gpu in snapshot["gpus"]] == [SMALL]
    assert "GPU 0 can't be read" in snapshot["reason"]
    world.change_gpu(BIG, lost=False)
    snapshot = child.look_later()
    assert ({gpu["uuid"] for gpu in snapshot["gpus"]}, snapshot["reason"]) == ({BIG, SMALL}, None)


INIT_CODES = [
    *(nvml.NO_PERMISSION, nvml.DRIVER_NOT_LOADED, nvml.LIBRARY_NOT_FOUND),
    *(nvml.LIB_RM_VERSION_MISMATCH, nvml.GPU_IS_LOST, nvml.NOT_SUPPORTED, nvml.UNKNOWN),
]


@pytest.mark.parametrize("code", INIT_CODES)
def test_failing_init_means_no_gpus_with_a_reason_until_it_works(
    child: Child, world: WorldFile, code: int
) -> None:
    world.change(init_code=code)
    snapshot = child.look()
    assert snapshot["gpus"] == []
    assert snapshot["reason"].startswith("NVML can't be used: ")
    world.change(init_code=0)
    assert child.look()["gpus"] == []  # not tried again at once
    snapshot = child.look_later()
    assert (len(snapshot["gpus"]), snapshot["reason"]) == (2, None)


def test_no_library_is_no_gpus_and_one_that_is_installed_later_is_found(
    library: Path, world: WorldFile, tmp_path: Path
) -> None:
    empty = tmp_path / "lib"
    empty.mkdir()
    child = Child(environment(empty / library.name, world))
    try:
        snapshot = child.look()
        assert (snapshot["gpus"], snapshot["driver_version"]) == ([], None)
        assert "Library Not Found" in snapshot["reason"]
        shutil.copy(library, empty)
        assert len(child.look_later()["gpus"]) == 2
    finally:
        child.end()


def test_driver_that_goes_away_leaves_known_cards_in_error_until_it_returns(
    child: Child, world: WorldFile
) -> None:
    child.look()
    fault = Fault(function="nvmlDeviceGetCount_v2", code=nvml.DRIVER_NOT_LOADED)
    world.change(faults=(fault,), init_code=nvml.DRIVER_NOT_LOADED)
    for snapshot in (child.look(), child.look_later()):
        assert [gpu["uuid"] for gpu in snapshot["gpus"]] == [BIG, SMALL]
        assert all(gpu["error"] for gpu in snapshot["gpus"])
    world.change(faults=(), init_code=0)
    assert [gpu["error"] for gpu in child.look_later()["gpus"]] == [None, None]


def test_hanging_call_holds_only_the_thread_that_looks(child: Child, world: WorldFile) -> None:
    child.look()
    world.change(faults=(Fault(function="nvmlDeviceGetMemoryInfo_v2", hang_s=1.0, uuid=BIG),))
    child.tell("start")
    answers = [child.tell("done") for _ in range(20)]
    assert answers == [False] * 20
    wait_for(lambda: child.tell("done"), "the end of the hanging look")


def test_processes_are_listed_once_with_their_memory(child: Child, world: WorldFile) -> None:
    mine = os.getpid()
    processes = (
        FakeProcess(pid=mine, used_bytes=GIB),
        FakeProcess(pid=mine, used_bytes=2 * GIB, kind="graphics"),
        FakeProcess(pid=4_000_001, used_bytes=None),
        FakeProcess(pid=4_000_002, used_bytes=GIB, kind="graphics"),
    )
    world.change_gpu(BIG, processes=processes)
    seen = child.gpus()[BIG]["processes"]
    assert [(entry["pid"], entry["used_bytes"]) for entry in seen] == [
        (mine, 2 * GIB),
        (4_000_001, None),
        (4_000_002, GIB),
    ]
    assert seen[0]["name"] == Path(Path("/proc/self/cmdline").read_text().split("\0")[0]).name
    assert seen[1]["name"] is None  # such a pid does not live here


def test_process_that_vanishes_between_looks_is_gone(child: Child, world: WorldFile) -> None:
    world.change_gpu(BIG, processes=(FakeProcess(pid=4_000_001, used_bytes=GIB),))
    assert len(child.gpus()[BIG]["processes"]) == 1
    world.change_gpu(BIG, processes=())
    assert child.gpus()[BIG]["processes"] == []


def test_card_that_does_not_tell_its_processes_is_still_read(
    child: Child, world: WorldFile
) -> None:
    function = "nvmlDeviceGetComputeRunningProcesses_v3"
    world.change(faults=(Fault(function=function, code=nvml.NO_PERMISSION),))
    assert [gpu["error"] for gpu in child.look()["gpus"]] == [None, None]


SLICES = (
    FakeMig(uuid="MIG-a", total_bytes=40 * GIB, used_bytes=GIB),
    FakeMig(
        uuid="MIG-b",
        total_bytes=20 * GIB,
        processes=(FakeProcess(pid=4_000_001, used_bytes=GIB),),
    ),
)


def test_mig_slices_stand_in_place_of_their_card(child: Child, world: WorldFile) -> None:
    world.change_gpu(BIG, name="NVIDIA H100 80GB HBM3", migs=SLICES)
    snapshot = child.look()
    assert [(gpu["uuid"], gpu["mig"]) for gpu in snapshot["gpus"]] == [
        (SMALL, False),
        ("MIG-a", True),
        ("MIG-b", True),
    ]
    first, second = snapshot["gpus"][1:]
    assert (first["total_bytes"], first["free_bytes"]) == (40 * GIB, 39 * GIB)
    assert first["name"] == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    assert [process["pid"] for process in second["processes"]] == [4_000_001]
    assert len({gpu["index"] for gpu in snapshot["gpus"]}) == 3


def test_mig_mode_switched_on_and_off_leaves_no_ghosts(child: Child, world: WorldFile) -> None:
    child.look()
    world.change_gpu(BIG, migs=SLICES)
    assert set(child.gpus()) == {SMALL, "MIG-a", "MIG-b"}
    world.change_gpu(BIG, migs=SLICES[1:])
    assert set(child.gpus()) == {SMALL, "MIG-b"}
    world.change_gpu(BIG, migs=None)
    gpus = child.gpus()
    assert {uuid: gpu["index"] for uuid, gpu in gpus.items()} == {BIG: 0, SMALL: 1}


def test_mig_mode_without_instances_is_an_error_that_says_so(
    child: Child, world: WorldFile
) -> None:
    world.change_gpu(BIG, migs=())
    gpus = child.gpus()
    assert "MIG" in gpus[BIG]["error"]
    assert gpus[SMALL]["error"] is None


def test_unified_memory_card_shows_the_hosts_memory(child: Child, world: WorldFile) -> None:
    fault = Fault(function="nvmlDeviceGetMemoryInfo_v2", code=nvml.NOT_SUPPORTED, uuid=BIG)
    world.change(faults=(fault,))
    host = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    gpu = child.gpus()[BIG]
    assert (gpu["error"], gpu["total_bytes"]) == (None, host)
    assert 0 < gpu["free_bytes"] < host


def test_old_driver_without_the_second_memory_call_is_read_by_the_first(
    child: Child, world: WorldFile
) -> None:
    function_not_found = 13
    fault = Fault(function="nvmlDeviceGetMemoryInfo_v2", code=function_not_found)
    world.change_gpu(BIG, used_bytes=GIB)
    world.change(faults=(fault,))
    assert child.gpus()[BIG]["free_bytes"] == 23 * GIB


def test_closed_observer_opens_again(child: Child) -> None:
    child.look()
    child.tell("close")
    assert len(child.look()["gpus"]) == 2


def test_no_process_has_more_than_is_used_however_fast_a_load_grows(
    child: Child, world: WorldFile
) -> None:
    done = threading.Event()

    def load() -> None:
        for size in range(MIB, 20 * GIB, MIB):
            if done.is_set():
                return
            world.change_gpu(BIG, processes=(FakeProcess(pid=os.getpid(), used_bytes=size),))

    loading = threading.Thread(target=load)
    loading.start()
    try:
        sizes = []
        for _ in range(200):
            gpu = child.gpus()[BIG]
            held = sum(process["used_bytes"] for process in gpu["processes"])
            assert held <= gpu["used_bytes"]
            sizes.append(held)
        assert len(set(sizes)) > 20  # it did grow meanwhile
    finally:
        done.set()
        loading.join()
