"""docs/security.md: each threat names the test that holds it, and that test is there."""

from __future__ import annotations

import re

import pytest

from smartproxy.config.known_holes import DANGEROUS
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def test_every_threat_names_a_test() -> None:
    rows = re.findall(r"^\| .* \|$", TEXT.split("## Threats")[1], re.MULTILINE)[1:]
    assert len(rows) == len(NAMED) > 25


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", source, re.MULTILINE)


def test_every_dangerous_argument_is_named() -> None:
    assert {flag for flag in DANGEROUS if flag.startswith("--") and "webui" not in flag} <= set(
        re.findall(r"`(--[\w-]+)`", TEXT)
    )
