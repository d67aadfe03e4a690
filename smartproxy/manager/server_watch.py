"""Ask each ready server how it does: /metrics and /slots into its row. Runs as a scheduler job."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from smartproxy.llama.http import Counters, counters
from smartproxy.manager.context import Tools
from smartproxy.state import servers as server_rows
from smartproxy.state.server_row import LiveServer, ServerColumns
from smartproxy.state.store import Store
from smartproxy.types import ServerState

logger = logging.getLogger(__name__)

#: a log over this size is cut back; llama-server appends, so that it goes on at the new end
LOG_LIMIT_BYTES = 64 << 20


def watch(tools: Tools) -> None:
    """Write what every ready server says of itself; one that does not answer keeps its last."""
    ready = [r for r in server_rows.live_servers(tools.store) if r.state == ServerState.READY]
    if not ready:
        return

    def ask(row: LiveServer) -> ServerColumns:
        return _ask(row, tools.store)

    with ThreadPoolExecutor(max_workers=min(8, len(ready))) as pool:
        for row, seen in zip(ready, pool.map(ask, ready), strict=True):
            if seen:
                server_rows.update_server(tools.store, row.id, **seen)


def _ask(row: LiveServer, store: Store) -> ServerColumns:
    """Return columns, or nothing when the server does not answer in time."""
    said = counters(row.port, row.api_key)
    return {} if said is None else _columns(row, said, store.now())


def _columns(row: LiveServer, said: Counters, now: float) -> ServerColumns:
    metrics, slots = said.metrics, said.slots
    predicted = metrics.get("tokens_predicted_total", 0.0)
    # the server's own tokens/s gauge is reset by every scrape: the counters are not
    before, before_at = row.predicted_tokens_total, row.watched_at
    rate = 0.0
    if before is not None and before_at is not None:
        rate = max(0.0, predicted - before) / max(0.001, now - before_at)
    busy = sum(bool(slot.get("is_processing")) for slot in slots)
    seen: ServerColumns = {
        "watched_at": now,
        "slots_total": len(slots),
        "slots_busy": busy,
        "requests_processing": int(metrics.get("requests_processing", 0)),
        "requests_deferred": int(metrics.get("requests_deferred", 0)),
        "prompt_tokens_total": metrics.get("prompt_tokens_total", 0.0),
        "predicted_tokens_total": predicted,
        "tokens_per_second": round(rate, 2),
    }
    # what nginx carries leaves no other trace of use
    if busy or predicted > (before or 0.0):
        seen["last_used_at"] = now
    return seen


def trim_logs(tools: Tools, keep: int = 100) -> None:
    """Cut logs that grew too long and delete all but the newest of ended servers."""
    logs = sorted(tools.log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime)
    live = {row.log_path for row in server_rows.live_servers(tools.store)}
    for path in logs[:-keep]:
        if str(path) not in live:
            path.unlink(missing_ok=True)
    for path in logs[-keep:]:
        if path.stat().st_size > LOG_LIMIT_BYTES:
            logger.info("log %s passed %d MB: emptied", path, LOG_LIMIT_BYTES >> 20)
            with path.open("r+b") as file:
                file.truncate(0)
