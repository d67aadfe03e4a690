"""What /metrics counts up: requests (written by workers), loads, tokens, evictions (the manager's).

Totals live in the file, so every worker gives the same ones, and a restart resets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smartproxy.state.store import Row, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """One total; label is what the name divides it by (schema.py), "" where it does not."""

    name: str
    model_id: str
    label: str
    value: float


def add_requests(store: Store, answered: Mapping[tuple[str, str], int]) -> None:
    """Add requests by model ("" where none was found) and code."""
    with store.write() as connection:
        connection.executemany(
            "INSERT INTO request_counts (model_id, code, value) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET value = value + excluded.value",
            [(model_id, code, number) for (model_id, code), number in answered.items()],
        )


def add_eviction(store: Store, model_id: str) -> None:
    """Count a model that was made to go for another one."""
    with store.write() as connection:
        connection.execute(
            "INSERT INTO counts (name, model_id, value) VALUES ('evictions', ?, 1)"
            " ON CONFLICT DO UPDATE SET value = value + 1",
            (model_id,),
        )


def totals(store: Store) -> list[Count]:
    """Return all totals, requests among them."""
    rows = store.read(
        "SELECT name, model_id, label, value FROM counts UNION ALL"
        " SELECT 'requests', model_id, code, value FROM request_counts ORDER BY 1, 2, 3"
    )
    return [_count(row) for row in rows]


def _count(row: Row) -> Count:
    return Count(name=row["name"], model_id=row["model_id"], label=row["label"], value=row["value"])
