"""What /metrics counts up: requests (written by workers), loads, tokens, evictions (the manager's).

Totals live in the file, so every worker gives the same ones, and a restart resets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from smartproxy.state.store import Row, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """One total; label is what the name divides it by (tables.sql), "" where it does not."""

    name: str
    model_id: str
    label: str
    value: float

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `counts` says."""
        return cls(**row)


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
    return [Count.from_row(row) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much a model was used lately: decaying counts, as of `at`."""

    at: float
    requests: float
    tokens: float
    #: the totals up to which it is counted
    total_requests: float
    total_tokens: float

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what a row of `uses` says."""
        return cls(
            at=row["counted_at"],
            requests=row["requests"],
            tokens=row["tokens"],
            total_requests=row["total_requests"],
            total_tokens=row["total_tokens"],
        )


def use_totals(store: Store) -> dict[str, tuple[float, float]]:
    """Return by model the requests that were served and the tokens generated, ever."""
    rows = store.read(
        "SELECT model_id, sum(requests) AS requests, sum(tokens) AS tokens FROM ("
        " SELECT model_id, value AS requests, 0 AS tokens FROM request_counts"
        " WHERE model_id != '' AND (code LIKE '2%' OR code = 'nginx')"
        " UNION ALL SELECT model_id, 0, value FROM counts"
        " WHERE name = 'tokens' AND label = 'predicted') GROUP BY model_id"
    )
    return {row["model_id"]: (row["requests"], row["tokens"]) for row in rows}


def uses(store: Store) -> dict[str, Use]:
    """Return the recent use of each model as last written."""
    return {row["model_id"]: Use.from_row(row) for row in store.read("SELECT * FROM uses")}


def write_uses(store: Store, changed: Mapping[str, Use]) -> None:
    """Write the recent use of these models."""
    with store.write() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO uses (model_id, requests, tokens, counted_at, total_requests,"
            " total_tokens) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (model_id, u.requests, u.tokens, u.at, u.total_requests, u.total_tokens)
                for model_id, u in changed.items()
            ],
        )
