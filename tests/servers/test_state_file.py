"""The state file is lost, damaged, locked, or on a full disk: loaded models answer all the same."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.servers.test_serve import Streaming, wait_state
from tests.support.gpu_running import Card, gpu_machine, model, uuid, world_of
from tests.support.running import Proxy, fake_model, running, wait_until

PAGE = 4096


def lose(path: Path) -> None:
    for part in path.parent.glob("state.db*"):
        part.unlink()


def damage_head(path: Path) -> None:
    checkpointed(path)
    overwrite(path, 0, PAGE)


def damage_pages(path: Path) -> None:
    checkpointed(path)
    overwrite(path, PAGE, path.stat().st_size)


def truncate(path: Path) -> None:
    checkpointed(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 // PAGE * PAGE)


def overwrite(path: Path, start: int, end: int) -> None:
    """Write zeros, as a broken disk may."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))


def checkpointed(path: Path) -> None:
    """Have all of the log in the file: SQLite would mend the file from it, and nothing is lost."""
    with contextlib.closing(sqlite3.connect(path)) as connection:

        def done() -> bool:
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy

        wait_until(done, what="a checkpoint")


@pytest.mark.parametrize("harm", [lose, damage_head, damage_pages, truncate])
def test_a_state_file_that_is_gone_is_made_anew_under_load(
    harm: Callable[[Path], None], tmp_path: Path
) -> None:
    models = {"loaded": fake_model(), "slow": fake_model(load_s=3)}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(1) as pool:
        stream = Streaming(proxy, "loaded")
        [server] = proxy.llama_servers()
        waiting = pool.submit(proxy.chat, "slow")
        wait_state(proxy, "slow", "starting")
        old = proxy.manager_pid()
        harm(proxy.state_dir / "state.db")
        assert proxy.chat("loaded").status_code == 200
        answer = waiting.result()
        assert answer.status_code == 200, answer.text
        wait_until(lambda: proxy.health().get("manager", {}).get("pid") not in (None, old))
        wait_until(lambda: proxy.states().get("loaded") == "ready", what="adopted")
        assert next(line for line in stream.lines if line)
        stream.close()
        assert proxy.chat("loaded").status_code == 200
        assert server.pid in [each.pid for each in proxy.llama_servers()]
        assert len(proxy.llama_servers()) == 2


def test_servers_of_a_lost_file_are_adopted_with_their_gpus_and_make_room(tmp_path: Path) -> None:
    models = {"wide": model(tmp_path, "wide", 20), "small": model(tmp_path, "small", 6)}
    cards = world_of(Card(gib=8), Card(gib=16))
    with gpu_machine(tmp_path, cards, models, min_residency=0) as (proxy, _):
        assert proxy.chat("wide").status_code == 200
        columns = "gpu_uuid, gpu_index, estimated_bytes, measured_bytes, reserved_bytes"
        query = f"SELECT {columns} FROM assignments ORDER BY rowid"
        wait_until(lambda: all(row["measured_bytes"] for row in proxy.rows(query)), what="measured")
        before, old = proxy.rows(query), proxy.manager_pid()
        lose(proxy.state_dir / "state.db")
        wait_until(lambda: proxy.health().get("manager", {}).get("pid") not in (None, old))
        wait_until(lambda: proxy.states().get("wide") == "ready", what="adopted")
        wait_until(lambda: all(row["measured_bytes"] for row in proxy.rows(query)), what="measured")
        after = proxy.rows(query)
        assert [row["gpu_uuid"] for row in after] == [uuid(1), uuid(0)]
        for was, now in zip(before, after, strict=True):
            assert (was["gpu_index"], was["measured_bytes"]) == (
                now["gpu_index"],
                now["measured_bytes"],
            )
            assert now["reserved_bytes"] == pytest.approx(was["reserved_bytes"], rel=0.1)
        assert proxy.chat("small").status_code == 200
        assert proxy.states() == {"wide": "stopped", "small": "ready"}


def test_a_locked_file_delays_loads_and_nothing_else(tmp_path: Path) -> None:
    models = {"loaded": fake_model(), "other": fake_model()}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(1) as pool:
        assert proxy.chat("loaded").status_code == 200
        with contextlib.closing(sqlite3.connect(proxy.state_dir / "state.db")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            waiting = pool.submit(proxy.chat, "other")
            for _ in range(3):
                assert proxy.chat("loaded").status_code == 200
            # longer than SQLite waits, and than a manager may be silent that is gone
            wait_until(
                lambda: "can't be used" in proxy.log() or "manager did not" in proxy.log(),
                what="the lock is told",
            )
            assert not waiting.done()
            assert proxy.chat("loaded").status_code == 200
            connection.rollback()
        assert waiting.result().status_code == 200
        wait_until(lambda: not proxy.rows("SELECT 1 FROM demands"), what="no demand is left")


@contextmanager
def full_disk(proxy: Proxy) -> Iterator[None]:
    """Let no process of a proxy but `serve` make a file longer, as on a full disk."""
    assert proxy.process is not None
    ours = psutil.Process(proxy.process.pid).children(recursive=True)
    for process in ours:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (PAGE, resource.RLIM_INFINITY))
    yield
    for process in ours:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(
                process.pid,
                resource.RLIMIT_FSIZE,
                (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
            )


def test_on_a_full_disk_loaded_models_answer_and_loads_wait(tmp_path: Path) -> None:
    models = {"loaded": fake_model(), "other": fake_model()}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(1) as pool:
        assert proxy.chat("loaded").status_code == 200
        servers = [server.pid for server in proxy.llama_servers()]
        with full_disk(proxy):
            waiting = pool.submit(proxy.chat, "other")
            for _ in range(20):
                assert proxy.chat("loaded").status_code == 200
            assert not waiting.done()
        assert waiting.result().status_code == 200
        assert set(servers) <= {server.pid for server in proxy.llama_servers()}
        assert not list(proxy.state_dir.glob("*unreadable*"))
