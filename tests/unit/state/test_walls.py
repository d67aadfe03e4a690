"""What SQLite and SQL are is known under state/ alone."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

PACKAGE = ROOT / "smartproxy"
SQL = re.compile(
    r"\bsqlite3?\b(?!_)|\b(?:SELECT|INSERT (?:OR \w+ )?INTO|DELETE FROM)\b|\bUPDATE \w+ SET\b"
    r"|\brow\[[\"']"
)


def test_no_sql_and_no_raw_row_outside_state() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if PACKAGE / "state" not in path.parents
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if SQL.search(line)
    ]
    assert found == []


def test_the_pattern_knows_sql_when_it_sees_it() -> None:
    for line in ('row["id"]', "import sqlite3", '"SELECT * FROM gpus"', '"UPDATE gpus SET x = 1"'):
        assert SQL.search(line)
    assert not SQL.search("# select the victims; update the row")
