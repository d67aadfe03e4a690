"""Rows leave the state file as values with types, and come back as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smartproxy.errors import StateRefused
from smartproxy.gpus.types import Gpu, GpuProcess, GpuSnapshot, GpuState
from smartproxy.state import leases, measurements, models
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import NewAssignment, assignments, models_by_gpu, reserved_bytes
from smartproxy.state.demands import ask, open_demands
from smartproxy.state.gpus import gpus, processes, write_snapshot
from smartproxy.state.manager_row import pause, resume
from smartproxy.state.measurements import MeasurementRow
from smartproxy.state.migrate import create
from smartproxy.state.models import FileRow, ModelRow
from smartproxy.state.store import Store
from smartproxy.types import ServerState
from tests.support.rows import new_server

CARD = Gpu(
    index=0,
    uuid="GPU-0",
    name="a card",
    pci_bus_id="0000:01:00.0",
    total_bytes=24,
    free_bytes=20,
    used_bytes=4,
    mig=True,
    processes=(GpuProcess(pid=7, used_bytes=3, name="llama-server"),),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made, _ = create(tmp_path / "state.db")
    yield made
    made.close()


def start(store: Store, model_id: str = "m", port: int = 9000) -> int:
    new = new_server(model_id, port, on_cpu_for_want_of_gpu=True, pid=7)
    share = NewAssignment(gpu_uuid="GPU-0", gpu_index=0, estimated_bytes=5, free_bytes=20)
    return server_rows.insert_server(store, new, [share], now=1.0, reason="a test")


def test_a_server_has_typed_columns_and_its_shares(store: Store) -> None:
    server_id = start(store)
    server_rows.transition(
        store, server_id, ServerState.STARTING, ServerState.READY, now=2.0, reason="up", load_s=1.5
    )
    assert leases.take_lease(store, "1:1", server_id, now=3.0)
    (live,) = server_rows.live_servers(store)
    assert (live.id, live.state, live.on_cpu_for_want_of_gpu) == (
        server_id,
        ServerState.READY,
        True,
    )
    assert (live.leased, live.used_at, live.last_used_at, live.load_s) == (1, 3.0, 1.0, 1.5)
    assert live.exit_code is None
    assert server_rows.server(store, server_id).api_key == "key"
    (share,) = assignments(store)[server_id]
    assert (share.estimated_bytes, share.reserved_bytes, share.free_bytes) == (5, 5, 20)
    assert share.measured_bytes is None
    assert (reserved_bytes(store), models_by_gpu(store)) == ({"GPU-0": 5}, {"GPU-0": ["m"]})
    assert leases.routes(store)["m"].state is ServerState.READY
    assert server_rows.last_load_s(store) == {"m": 1.5}


@pytest.mark.parametrize(("model_id", "port"), [("m", 9001), ("n", 9000)])
def test_a_second_live_server_of_a_model_or_a_port_is_refused(
    store: Store, model_id: str, port: int
) -> None:
    server_id = start(store)
    with pytest.raises(StateRefused):
        start(store, model_id, port)
    assert [row.id for row in server_rows.live_servers(store)] == [server_id]
    assert list(assignments(store)) == [server_id]


def test_gpus_and_their_processes_name_our_servers(store: Store) -> None:
    server_id = start(store)
    write_snapshot(store, GpuSnapshot(gpus=(CARD,), observed_at=4.0), now=4.0)
    (gpu,) = gpus(store)
    assert (gpu.uuid, gpu.state, gpu.mig, gpu.error) == ("GPU-0", GpuState.ASSIGNED, True, None)
    (process,) = processes(store)
    assert (process.server_id, process.model_id, process.used_bytes) == (server_id, "m", 3)


def test_a_model_and_a_file_come_back_as_written(store: Store) -> None:
    model = ModelRow(id="m", context_size=4096, confident=False, updated_at=1.0)
    models.write_model(store, ModelRow(id="gone"))
    models.write_model(store, model)
    models.keep_models(store, ["m", "other"])
    assert models.models(store) == {"m": model}
    file = FileRow(path="m.gguf", size_bytes=1, mtime_ns=2, metadata="{}", read_at=3.0)
    models.write_file(store, file)
    assert models.file_of(store, "m.gguf") == file
    assert models.file_of(store, "n.gguf") is None


def test_measurements_come_back_as_written(store: Store) -> None:
    host = MeasurementRow(
        at=1.0,
        model_id="m",
        server_id=3,
        build="b",
        file_key="f",
        options_key="o",
        settings_key="s",
        layout="{}",
        device=measurements.HOST,
        device_index=-1,
        predicted_bytes=10,
        estimated_bytes=11,
        overhead_bytes=0,
    )
    measurements.expect(store, [host])
    assert measurements.of_server(store, 3) == measurements.of_file(store, "f", "b") == [host]
    measurements.learn_overhead(store, "GPU-0", "b", overhead_bytes=5, warm=False, now=1.0)
    measurements.learn_overhead(store, "GPU-0", "b", overhead_bytes=4, warm=True, now=2.0)
    known = measurements.overheads(store, "b")["GPU-0"]
    assert (known.overhead_bytes, known.warm) == (5, True)


def test_a_pause_counts_for_nobody_who_waits(store: Store) -> None:
    ask(store, "load", "before", "w", now=100.0)
    assert pause(store, now=110.0) == 110.0
    assert pause(store, now=120.0) == 110.0
    ask(store, "load", "meanwhile", "w", now=130.0)
    assert resume(store, now=150.0) == 40.0
    assert resume(store, now=160.0) is None
    waited = {demand.model_id: 150.0 - demand.asked_at for demand in open_demands(store)}
    assert waited == {"before": 10.0, "meanwhile": 0.0}


def test_many_ended_servers_are_not_kept_for_a_day(store: Store) -> None:
    ended = start(store)
    server_rows.transition(
        store, ended, ServerState.STARTING, ServerState.FAILED, now=2.0, reason="down"
    )
    names = [row["name"] for row in store.read("PRAGMA table_info(servers)")][1:]
    with store.write() as connection:
        for _ in range(server_rows.MOST_KEPT + 4):  # as the first, with ids of their own
            connection.execute(
                f"INSERT INTO servers ({', '.join(names)}) SELECT {', '.join(names)} FROM servers"
                " WHERE id = ?",
                (ended,),
            )
    live = start(store)
    server_rows.prune(store, now=3.0)
    kept = [row["id"] for row in store.read("SELECT id FROM servers ORDER BY id")]
    assert kept == list(range(live - server_rows.MOST_KEPT + 1, live + 1))
    # a day later the last few are still there
    server_rows.prune(store, now=3.0 + server_rows.ENDED_KEPT_S)
    assert store.read("SELECT count(*) FROM servers")[0][0] == server_rows.FEWEST_KEPT
    assert list(assignments(store)) == [live]
