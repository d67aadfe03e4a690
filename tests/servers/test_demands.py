"""What a running worker writes for a request that has to wait for its model."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from tests.support.running import fake_model, running, wait_until


def test_a_model_is_wanted_until_the_lease_is_written(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        with contextlib.closing(sqlite3.connect(proxy.state_dir / "state.db")) as file:
            file.execute("CREATE TABLE wanted (demands INTEGER)")
            file.execute(
                "CREATE TRIGGER at_lease AFTER INSERT ON leases BEGIN"
                " INSERT INTO wanted SELECT count(*) FROM demands WHERE kind = 'load'; END"
            )
            file.commit()
        assert proxy.chat("m").status_code == 200
        assert [row["demands"] for row in proxy.rows("SELECT demands FROM wanted")] == [1]
        wait_until(lambda: proxy.rows("SELECT 1 FROM demands") == [], what="withdrawn")
