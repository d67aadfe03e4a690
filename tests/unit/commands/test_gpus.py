"""`smartproxy gpus`: the tables, and the command over a real state file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from smartproxy.commands.gpus import age_line, gpu_table, gpus_command, process_table
from smartproxy.entities import GPU, GPUProcess
from smartproxy.errors import ManagerDown
from smartproxy.gpus.types import GpuState
from smartproxy.state.migrate import create
from smartproxy.types import GIB

BUSY = GPU(
    id=0,
    name="NVIDIA GeForce RTX 4090",
    total_memory=24,
    free_memory=3.5,
    used_memory=20.25,
    utilization=87,
    temperature=66.4,
    power_usage=301.7,
    assigned_models=["llama-7b", "qwen"],
    state=GpuState.ASSIGNED,
    processes=[
        GPUProcess(pid=11, name="Xorg", used_memory=0.25),
        GPUProcess(pid=12, name="llama-server", used_memory=20),
        GPUProcess(pid=13),
    ],
)
LOST = GPU(
    id=1,
    name="Tesla P4",
    total_memory=8,
    free_memory=8,
    used_memory=0,
    utilization=0,
    state=GpuState.ERROR,
    error="GPU is lost",
)


def test_table_has_one_line_a_gpu_and_dashes_for_missing_readings() -> None:
    lines = gpu_table([BUSY, LOST]).splitlines()
    assert lines[0].split()[:5] == ["gpu", "name", "state", "used", "GB"]
    assert lines[2].split() == [
        *("0", "NVIDIA", "GeForce", "RTX", "4090", "assigned", "20.2", "3.5", "24.0"),
        *("87", "66", "302", "llama-7b,", "qwen"),
    ]
    assert lines[3].split()[-3:] == ["-", "-", "-"]


def test_error_of_a_gpu_stands_below_the_table() -> None:
    assert gpu_table([BUSY, LOST]).splitlines()[-1] == "gpu 1: GPU is lost"
    assert "gpu 0" not in gpu_table([BUSY])


def test_processes_are_listed_largest_first_unknown_last() -> None:
    lines = process_table([BUSY, LOST]).splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["0", "12", "llama-server", "20.0"],
        ["0", "11", "Xorg", "0.2"],
        ["0", "13", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("observed_at", "reason", "line"),
    [
        (None, None, "the manager has not looked at the GPUs yet"),
        (90.0, None, "seen 10 s ago"),
        (90.0, "no driver", "seen 10 s ago; no driver"),
        (101.0, None, "seen 0 s ago"),
    ],
)
def test_age_is_told_with_the_reason(
    observed_at: float | None, reason: str | None, line: str
) -> None:
    assert age_line(observed_at, reason, now=100.0) == line


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"models": {}}))
    return path


def test_command_shows_what_the_state_file_holds(config: Path) -> None:
    store, _ = create(config.parent / "state" / "state.db")
    with store.write() as connection:
        connection.execute("UPDATE manager SET observed_at = 1, mode = 'gpu' WHERE id = 1")
        connection.execute(
            "INSERT INTO gpus (uuid, gpu_index, name, pci_bus_id, state, total_bytes, free_bytes,"
            " used_bytes, utilization, state_changed_at)"
            " VALUES ('GPU-a', 3, 'NVIDIA L4', '', 'available', ?, ?, ?, 5, 1)",
            (24 * GIB, 20 * GIB, 4 * GIB),
        )
        connection.execute(
            "INSERT INTO gpu_processes VALUES ('GPU-a', 77, 'other', ?, NULL)", (GIB,)
        )
    store.close()
    result = CliRunner().invoke(gpus_command, ["--config", str(config), "--processes"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if line]
    assert ["3", "NVIDIA", "L4", "available", "4.0", "20.0", "24.0", "5", "-", "-", "-"] in lines
    assert ["3", "77", "other", "1.0"] in lines
    assert result.output.splitlines()[-1].startswith("seen ")


def test_command_says_that_there_are_no_gpus_and_why(config: Path) -> None:
    store, _ = create(config.parent / "state" / "state.db")
    with store.write() as connection:
        connection.execute("UPDATE manager SET observed_at = 1, mode_reason = 'no driver'")
    store.close()
    output = CliRunner().invoke(gpus_command, ["--config", str(config)]).output.splitlines()
    assert output[0] == "no GPUs: models run on the CPU"
    assert output[-1].endswith("; no driver")


def test_command_without_a_state_file_says_what_to_start(config: Path) -> None:
    result = CliRunner().invoke(gpus_command, ["--config", str(config)])
    assert isinstance(result.exception, ManagerDown)
    assert "smartproxy serve" in str(result.exception)
