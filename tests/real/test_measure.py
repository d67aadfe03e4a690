"""Estimated against measured, end to end: the real server on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.servers.test_measure import ROUNDING, server_rows, unload
from tests.support.gpu_running import MIB
from tests.support.running import REAL_MODEL, running, wait_until


def test_the_real_servers_buffers_are_kept_and_agree_with_the_estimate(tmp_path: Path) -> None:
    models = {"smol": {"path": str(REAL_MODEL)}}
    with running(tmp_path, models, real=True, ctx_size=2048, gpu_poll_interval=0.5) as proxy:
        assert proxy.chat("smol").status_code == 200

        def measured() -> dict[str, Any] | None:
            rows = proxy.rows("SELECT * FROM measurements")
            return (
                rows[0] if rows and rows[0]["buffers_bytes"] and rows[0]["process_bytes"] else None
            )

        row = wait_until(measured, what="measured")
        assert (row["device"], row["device_index"]) == ("host", -1)
        assert row["buffers_bytes"] <= row["predicted_bytes"] <= 1.1 * row["buffers_bytes"]
        (server,) = server_rows(proxy, "smol")
        assert server["host_estimated_bytes"] == row["predicted_bytes"]
        assert server["host_measured_bytes"] > 90 * MIB
        assert not [line for line in proxy.log().splitlines() if "ERROR" in line]
        unload(proxy, "smol")
        assert proxy.chat("smol").status_code == 200
        again = server_rows(proxy, "smol")[-1]
        assert again["host_estimated_bytes"] == pytest.approx(
            row["buffers_bytes"], abs=ROUNDING + 1
        )


def test_a_draft_model_is_really_used_and_was_counted(tmp_path: Path) -> None:
    models = {"smol": {"path": str(REAL_MODEL), "draft_model": str(REAL_MODEL)}}
    with running(tmp_path, models, real=True, ctx_size=2048) as proxy:
        answer = proxy.chat("smol", max_tokens=16, temperature=0).json()
        assert answer["timings"]["draft_n"] > 0
        (row,) = wait_until(
            lambda: proxy.rows("SELECT * FROM measurements WHERE buffers_bytes IS NOT NULL"),
            what="measured",
        )
        assert row["buffers_bytes"] <= row["predicted_bytes"] <= 1.2 * row["buffers_bytes"]
