"""/metrics: what the state file holds, in Prometheus' words; counted over all workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import pytest

from smartproxy.proxy.pages import metrics
from smartproxy.proxy.pages.counting import RequestCounts
from smartproxy.state import counts
from smartproxy.state import demands as demand_rows
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import NewAssignment
from smartproxy.state.manager_row import update_manager
from smartproxy.state.migrate import create
from smartproxy.state.server_row import NewServer, ServerColumns
from smartproxy.state.store import Store
from smartproxy.types import GIB, ServerState
from tests.support.samples import Samples, parsed, value
from tests.unit.test_grafana import METRICS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store, _ = create(tmp_path / "state.db")
    yield store
    store.close()


def seen(store: Store) -> Samples:
    return parsed(metrics.text(store).decode())


def add_gpu(store: Store, index: int, *, error: str | None = None) -> None:
    with store.write() as connection:
        connection.execute(
            "INSERT INTO gpus (uuid, gpu_index, name, pci_bus_id, state, error, total_bytes,"
            " free_bytes, used_bytes, utilization, temperature_c, state_changed_at)"
            " VALUES (?, ?, 'NVIDIA L4', '', ?, ?, ?, ?, ?, 50, 61, 1)",
            (
                *(f"GPU-{index}", index, "error" if error else "available", error),
                *(24 * GIB, 20 * GIB, 4 * GIB),
            ),
        )


def add_server(store: Store, model: str, port: int) -> int:
    return server_rows.insert_server(
        store,
        NewServer(
            model_id=model,
            port=port,
            api_key="",
            command="[]",
            log_path="",
            settings_key="",
            host_estimated_bytes=7,
        ),
        [NewAssignment(gpu_uuid="GPU-0", gpu_index=0, estimated_bytes=3 * GIB)],
        now=1.0,
        reason="a test",
    )


def move(
    store: Store, server_id: int, before: str, after: str, **columns: Unpack[ServerColumns]
) -> None:
    moved = server_rows.transition(
        store,
        server_id,
        ServerState(before),
        ServerState(after),
        now=2.0,
        reason="a test",
        **columns,
    )
    assert moved


def test_a_gpu_has_its_readings_and_lacks_those_it_does_not_tell(store: Store) -> None:
    add_gpu(store, 0)
    samples = seen(store)
    where = {"gpu": "0", "uuid": "GPU-0"}
    assert value(samples, "gpu_up", **where) == 1
    assert value(samples, "gpu_memory_bytes", **where, kind="total") == 24 * GIB
    assert value(samples, "gpu_memory_bytes", **where, kind="used") == 4 * GIB
    assert value(samples, "gpu_memory_bytes", **where, kind="free") == 20 * GIB
    assert value(samples, "gpu_utilization_percent", **where) == 50
    assert value(samples, "gpu_temperature_celsius", **where) == 61
    assert value(samples, "gpu_power_watts", **where) is None


def test_a_gpu_in_error_shows_no_old_readings(store: Store) -> None:
    add_gpu(store, 0, error="lost")
    add_server(store, "m", 9000)
    samples = seen(store)
    where = {"gpu": "0", "uuid": "GPU-0"}
    assert value(samples, "gpu_up", **where) == 0
    assert value(samples, "gpu_memory_bytes", **where, kind="free") is None
    assert value(samples, "gpu_temperature_celsius", **where) is None
    assert value(samples, "gpu_memory_bytes", **where, kind="reserved") == 3 * GIB


def test_a_server_has_its_memory_by_gpu_and_on_the_host(store: Store) -> None:
    server_id = add_server(store, "m", 9000)
    with store.write() as connection:
        connection.execute("UPDATE assignments SET measured_bytes = 5")
    server_rows.update_server(store, server_id, requests_processing=2, slots_total=4, slots_busy=3)
    samples = seen(store)
    assert value(samples, "server_memory_bytes", model="m", gpu="0", kind="measured") == 5
    assert value(samples, "server_memory_bytes", model="m", gpu="0", kind="estimated") == 3 * GIB
    assert value(samples, "server_memory_bytes", model="m", gpu="host", kind="estimated") == 7
    assert value(samples, "server_memory_bytes", model="m", gpu="host", kind="measured") is None
    assert value(samples, "server_requests_processing", model="m") == 2
    assert value(samples, "server_slots", model="m", kind="busy") == 3


def test_loads_are_counted_by_how_they_end(store: Store) -> None:
    for port, after, columns in (
        (9000, "ready", {"load_s": 1.5}),
        (9001, "failed", {"error_code": "load_timeout"}),
        (9002, "failed", {}),
        (9003, "stopping", {}),
    ):
        move(store, add_server(store, f"m{port}", port), "starting", after, **columns)
    samples = seen(store)
    assert value(samples, "loads_total", model="m9000", outcome="ready") == 1
    assert value(samples, "load_seconds", model="m9000") == 1.5
    assert value(samples, "loads_total", model="m9001", outcome="load_timeout") == 1
    assert value(samples, "loads_total", model="m9002", outcome="failed") == 1
    assert not any(("model", "m9003") in labels for name, labels in samples if "loads" in name)


def test_a_crash_after_loading_is_no_failed_load(store: Store) -> None:
    server_id = add_server(store, "m", 9000)
    move(store, server_id, "starting", "ready")
    move(store, server_id, "ready", "failed", error_code="backend_failed")
    assert value(seen(store), "loads_total", model="m", outcome="ready") == 1
    assert value(seen(store), "loads_total", model="m", outcome="backend_failed") is None


def test_tokens_of_a_model_add_up_over_its_servers(store: Store) -> None:
    for tokens in ((10, 100), (10, 160)), ((0, 0), (5, 40)):
        server_id = add_server(store, "m", 9000)
        for prompt, predicted in tokens:
            server_rows.update_server(
                store, server_id, prompt_tokens_total=prompt, predicted_tokens_total=predicted
            )
        move(store, server_id, "starting", "stopping")
        move(store, server_id, "stopping", "stopped")
    samples = seen(store)
    assert value(samples, "server_tokens_total", model="m", kind="predicted") == 200
    assert value(samples, "server_tokens_total", model="m", kind="prompt") == 15


def test_evictions_and_waiting_requests_are_counted(store: Store) -> None:
    assert value(seen(store), "evictions_total") == 0
    counts.add_eviction(store, "a")
    counts.add_eviction(store, "b")
    demand_rows.ask(store, "load", "c", "1:1", now=1.0)
    demand_rows.ask(store, "unload", "c", "1:1", now=1.0)
    assert value(seen(store), "evictions_total") == 2
    assert value(seen(store), "queue_length") == 1


def test_requests_of_all_workers_add_up(store: Store) -> None:
    workers = [RequestCounts(store), RequestCounts(store)]
    for worker in workers:
        for _ in range(5):
            worker.add("m", "200")
        worker.add("", "404")
        worker.write()
    assert value(seen(store), "requests_total", model="m", code="200") == 10
    assert value(seen(store), "requests_total", model="", code="404") == 2


def test_requests_that_could_not_be_written_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    worker = RequestCounts(Store(path))
    worker.add("m", "200")
    worker.write()
    store, _ = create(path)
    worker.write()
    assert value(seen(store), "requests_total", model="m", code="200") == 1
    store.close()


def test_the_time_of_the_last_decision_is_told_once_there_was_one(store: Store) -> None:
    assert value(seen(store), "decision_seconds") is None
    update_manager(store, decision_s=0.002)
    assert value(seen(store), "decision_seconds") == 0.002


def test_the_dashboard_knows_exactly_what_is_exposed(store: Store) -> None:
    add_gpu(store, 0)
    with store.write() as connection:
        connection.execute("UPDATE gpus SET power_w = 1")
    server_id = add_server(store, "m", 9000)
    server_rows.update_server(store, server_id, requests_processing=0, slots_total=4, slots_busy=0)
    server_rows.update_server(store, server_id, prompt_tokens_total=0, load_s=1)
    server_rows.update_server(store, server_id, predicted_tokens_total=0)
    move(store, server_id, "starting", "ready")
    counts.add_requests(store, {("m", "200"): 1})
    update_manager(store, decision_s=0.002)
    exposed = {name: set(dict(labels)) for name, labels in seen(store)}
    assert exposed == {name: set(labels) for name, labels in METRICS.items()}


def test_an_abandoned_request_counts_as_499(tmp_path: Path) -> None:
    """nginx's number for a client that left before an answer began."""
    store, _ = create(tmp_path / "state.db")
    counting = RequestCounts(store)
    for status in (0, None, 200):
        counting.settled("m", status)
    counting.write()
    codes = {count.label for count in counts.totals(store)}
    store.close()
    assert codes == {"499", "nginx", "200"}
