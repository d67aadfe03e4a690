"""What is shown of servers."""

from __future__ import annotations

from pathlib import Path

from smartproxy.proxy.pages import view
from smartproxy.state import servers as server_rows
from smartproxy.state.assignments import UNKNOWN_INDEX, NewAssignment
from smartproxy.state.migrate import create
from tests.support.rows import new_server


def test_a_server_that_was_adopted_before_the_gpus_were_seen_has_no_assignment_yet(
    tmp_path: Path,
) -> None:
    """Found by chaos: /health was a 500 after the state file had been removed."""
    store, _ = create(tmp_path / "state.db")
    share = NewAssignment(gpu_uuid="GPU-0", gpu_index=UNKNOWN_INDEX, estimated_bytes=5)
    server_rows.insert_server(store, new_server(pid=7), [share], now=1.0, reason="adopted")
    (shown,) = view.servers(store, now=2.0)
    assert (shown.model_id, shown.gpu_assignment) == ("m", None)
    with store.write() as connection:
        connection.execute("UPDATE assignments SET gpu_index = 3")
    (shown,) = view.servers(store, now=2.0)
    assert shown.gpu_assignment is not None
    assert shown.gpu_assignment.gpu_ids == [3]
    store.close()
