"""A load or unload by hand waits on while the state file is lost, and asks again in the new one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smartproxy.errors import ManagerDown
from smartproxy.proxy.ask import Question, ask_manager
from smartproxy.state import demands as demand_rows
from smartproxy.state.manager_row import update_manager
from smartproxy.state.migrate import create
from smartproxy.state.store import Store
from tests.support.upstreams import wait_until

PATIENT = Question(kind="unload", model_id="m", limit_s=60, patience_s=60)


def remove(path: Path) -> None:
    for entry in path.parent.glob("state.db*"):
        entry.unlink()


def test_a_question_outlives_the_file_that_it_stood_in(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first, _ = create(path)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask_manager, Store(path), tmp_path, PATIENT)
        wait_until(lambda: demand_rows.open_demands(first), "the question")
        first.close_all()
        remove(path)
        second, _ = create(path)
        update_manager(second, pid=1, heartbeat_at=second.now())
        wait_until(lambda: demand_rows.open_demands(second), "the question in the new file")
        (demand,) = demand_rows.open_demands(second)
        demand_rows.answer(second, [demand.id], now=second.now())
        assert asked.result(60) == {}
    assert demand_rows.open_demands(second) == []
    second.close_all()


def test_without_a_file_the_manager_gives_no_sign(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store, _ = create(path)
    short = Question(kind="unload", model_id="m", limit_s=60, patience_s=0.2)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask_manager, Store(path), tmp_path, short)
        wait_until(lambda: demand_rows.open_demands(store), "the question")
        store.close_all()
        remove(path)
        with pytest.raises(ManagerDown, match="does not answer"):
            asked.result(60)
