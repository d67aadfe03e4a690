"""Pieces of SQL that more than one table needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache

from smartproxy.types import LIVE_STATES

#: the states of live servers, as a list for IN
LIVE = "({})".format(", ".join(f"'{state.value}'" for state in sorted(LIVE_STATES)))


@cache
def columns(row: type, prefix: str = "") -> str:
    """Return the columns of a row's class, for SELECT and INSERT; prefix: such as "s."."""
    return ", ".join(f"{prefix}{field.name}" for field in fields(row))


@cache
def marks(row: type) -> str:
    """Return the named placeholders of a row's class, in the same order, for VALUES."""
    return ", ".join(f":{field.name}" for field in fields(row))


def settings(names: Iterable[str]) -> str:
    """Return "name = :name, ..." for SET."""
    return ", ".join(f"{name} = :{name}" for name in names)
