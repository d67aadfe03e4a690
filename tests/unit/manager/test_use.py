"""Recent use: counts that decay, and what of them is in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from smartproxy.manager import use as recent_use
from smartproxy.planner.victims import HALF_LIFE_S
from smartproxy.state import counts
from smartproxy.state.migrate import create
from smartproxy.state.store import Store

NOW = 1_000_000.0


def served(store: Store, model_id: str, requests: int) -> None:
    counts.add_requests(store, {(model_id, "200"): requests, (model_id, "503"): 7})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create(tmp_path / "state.db")[0]


def test_use_falls_to_half_in_a_half_life_and_new_use_comes_on_top(store: Store) -> None:
    book = recent_use.load(store, NOW)
    served(store, "m", 8)
    recent_use.count(store, book, NOW + 2)
    assert recent_use.decayed(book.uses["m"], NOW + 2 + HALF_LIFE_S) == (pytest.approx(4), 0)
    counts.add_requests(store, {("m", "nginx"): 1})
    recent_use.count(store, book, NOW + 2 + HALF_LIFE_S)
    assert book.uses["m"].requests == pytest.approx(5)


def test_a_new_manager_goes_on_where_the_old_one_was(store: Store) -> None:
    served(store, "m", 8)
    recent_use.count(store, recent_use.RecentUse(uses={}, counted_at=0), NOW)
    served(store, "m", 2)  # while no manager was there
    book = recent_use.load(store, NOW + 10)
    recent_use.count(store, book, NOW + 12)
    assert book.uses["m"].requests == pytest.approx(10, rel=0.02)


def test_totals_of_before_anything_was_counted_are_not_recent(store: Store) -> None:
    served(store, "m", 1000)
    book = recent_use.load(store, NOW)
    recent_use.count(store, book, NOW + 2)
    assert book.uses["m"].requests == 0


def test_only_what_was_served_counts(store: Store) -> None:
    book = recent_use.load(store, NOW)
    counts.add_requests(store, {("m", "503"): 5, ("", "200"): 5, ("n", "200"): 1})
    recent_use.count(store, book, NOW + 2)
    assert {name: use.requests for name, use in book.uses.items()} == {"n": 1}
