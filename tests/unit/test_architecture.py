"""docs/architecture.md and the folders' own docstrings name every folder that there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "smartproxy"
PAGE = ROOT / "docs" / "architecture.md"
#: a folder's docstring is read before its files, so it must stay short
MOST_LINES = 8


def folders() -> list[str]:
    """Return the folders of the package as the page writes them, such as `proxy/wire/`."""
    found = (path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted({f"{name}/" for name in found if name != "."})


def rows(page: str) -> dict[str, str]:
    """Return the rows of the page's table of folders: folder -> what it may import."""
    table = page.split("| folder |")[1].split("\n\n")[0]
    found = re.findall(r"^\| `([\w/]+/)` \|.*\| (.*) \|$", table, re.MULTILINE)
    assert len(found) == len(dict(found)), "a folder has two rows"
    return dict(found)


def problems(page: str, there: list[str]) -> list[str]:
    """Return what the page's table has wrong."""
    listed = rows(page)
    return [
        *(f"{folder} has no row" for folder in there if folder not in listed),
        *(f"{folder} is no folder" for folder in listed if folder not in there),
    ]


def docstring(folder: str) -> str:
    source = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def test_the_page_has_a_row_for_every_folder_and_no_other() -> None:
    assert problems(PAGE.read_text(encoding="utf-8"), folders()) == []


def test_a_wrong_table_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "planner/ has no row" in problems(
        page.replace("| `planner/` |", "| planner |"), folders()
    )
    assert "state/ is no folder" in problems(page, [name for name in folders() if name != "state/"])


def test_folders_of_the_table_import_folders_that_there_are() -> None:
    named = {
        name
        for allowed in rows(PAGE.read_text(encoding="utf-8")).values()
        for name in re.findall(r"`([\w/.]+)`", allowed)
    }
    assert [name for name in sorted(named) if not (PACKAGE / name).exists()] == []


@pytest.mark.parametrize("folder", folders())
def test_a_folder_says_what_it_knows_and_may_import(folder: str) -> None:
    text = docstring(folder)
    assert "May import: " in text
    assert len(text.splitlines()) <= MOST_LINES


def test_every_folder_is_a_package() -> None:
    assert [name for name in folders() if not Path(PACKAGE / name / "__init__.py").exists()] == []


def defined_in(path: Path) -> set[str]:
    """Return the functions and classes that a file defines, methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{inner.name}" for inner in ast.walk(node) if hasattr(inner, "name")
            }
    return found


@pytest.mark.parametrize(
    ("file", "name"), re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE.read_text(encoding="utf-8"))
)
def test_what_the_page_names_is_defined_there(file: str, name: str) -> None:
    # in the way of a request, paths are below proxy/
    path = next(place for place in (PACKAGE / file, PACKAGE / "proxy" / file) if place.exists())
    assert name in defined_in(path)
