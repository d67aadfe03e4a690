"""The tree in smartproxy/errors.py's docstring, and README's table, name every error."""

from __future__ import annotations

import re
from collections.abc import Iterator

from smartproxy import errors
from smartproxy.errors import SmartProxyError
from tests.support.paths import ROOT

#: never sent to a client, so without status and code in the tree
NEVER_SENT = {"ConfigError", "ObserveError"}


def classes(root: type[SmartProxyError] = SmartProxyError) -> Iterator[type[SmartProxyError]]:
    """Yield the error classes of the module; other modules' own errors derive from these."""
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_the_tree_has_every_error_with_its_status_and_code() -> None:
    tree = re.findall(r"(\w+Error|[A-Z]\w+)  +(\d{3})  (\w+)", errors.__doc__ or "")
    expected = {
        (error.__name__, str(error.http_status), error.code)
        for error in classes()
        if error.__name__ not in NEVER_SENT
    }
    assert set(tree) == expected
    assert all(f"-- {name} " in (errors.__doc__ or "") for name in NEVER_SENT)


def test_readme_has_every_status_and_code() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Errors")[1]
    rows = re.findall(r"^\| (\d{3}) \| (.*) \|$", section.split("\n## ")[0], re.MULTILINE)
    listed = {(status, code) for status, cell in rows for code in re.findall(r"`(\w+)`", cell)}
    assert listed == {(str(error.http_status), error.code) for error in classes()}
