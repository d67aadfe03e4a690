"""The rules that keep the house (docs/architecture.md), read off the source of every module.

A folder is one body of knowledge. One row a folder says what it may import; the rest are rules for
all of them. `proxy/relay` is a folder of its own, as every folder in a folder is.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "smartproxy"
#: of the standard library, what has no clock, disk, network, process or log in it
HARMLESS = {
    *("__future__", "math", "dataclasses", "collections", "typing", "enum", "functools"),
    *("itertools", "bisect", "heapq", "operator", "re", "struct", "types"),
}
#: packages that may be missing, and so may be imported inside a function
OPTIONAL = {"pynvml", "orjson"}
MOST_FILES = 15
MOST_FILES_OF = {"manager": 22}
LINES_OF_A_FOLDERS_DOCSTRING = range(3, 9)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a folder may import. Standard library: all but subprocess, or only HARMLESS."""

    ours: frozenset[str]
    packages: frozenset[str]
    pure: bool
    subprocess: bool


def row(ours: str, packages: str = "", *, pure: bool = False, subprocess: bool = False) -> Row:
    return Row(
        ours=frozenset(ours.split()),
        packages=frozenset(packages.split()),
        pure=pure,
        subprocess=subprocess,
    )


#: folder, or file of the front door -> what it may import. "Upwards" is what a row leaves out.
ROWS = {
    "types": row("", pure=True),
    "errors": row("", pure=True),
    "log": row(""),
    "lifetime": row("", "psutil"),
    "signs": row(""),
    "doorbell": row(""),
    "orders": row("types lifetime"),
    "entities": row("types gpus planner", "pydantic"),
    "cli": row("errors commands", "click"),
    "model_file": row("errors gpus", "gguf"),
    "gpus": row("types errors", "pynvml"),
    "memory": row("types errors gpus model_file", pure=True),
    "planner": row("types errors gpus memory", pure=True),
    "config": row("errors memory planner", "pydantic"),
    "catalog": row("types errors config model_file planner"),
    "llama": row(
        "types errors lifetime config catalog gpus memory planner",
        "psutil requests",
        subprocess=True,
    ),
    "state": row("types errors gpus planner", "sqlite_utils"),
    "manager": row(
        "types errors log lifetime signs orders doorbell config catalog gpus model_file memory"
        " planner llama state",
        "apscheduler psutil",
    ),
    "proxy/wire": row("errors", "orjson"),
    "proxy/relay": row("errors proxy/wire", "flask werkzeug orjson uvloop"),
    "proxy/pages": row(
        "types errors entities lifetime doorbell config catalog gpus state proxy proxy/relay"
        " proxy/wire",
        "flask prometheus_client tabulate yaml",
    ),
    "proxy/worker": row("errors log proxy proxy/wire proxy/relay", "gunicorn"),
    "proxy": row(
        "errors log lifetime signs doorbell config catalog state proxy/wire proxy/relay proxy/pages"
        " proxy/worker",
        "flask werkzeug gunicorn msgspec",
    ),
    "serving": row("errors lifetime signs config", "psutil", subprocess=True),
    "commands": row(
        "types errors entities log doorbell config catalog gpus model_file memory planner state"
        " manager proxy proxy/pages serving",
        "click tabulate",
    ),
}
#: what only one place may know: a pattern in the source -> files that may have it
ALONE = {
    r"^\s*(?:import|from) sqlite3\b": ("state/",),
    r'\brow\["': ("state/",),
    r"\b(?:SELECT .* FROM|INSERT INTO|DELETE FROM|UPDATE \w+ SET) ": ("state/",),
    r"^\s*import pynvml|\bpynvml\.\w": ("gpus/nvml.py",),
    r'"--(?:ctx-size|n-gpu-layers|tensor-split|parallel|cache-type-k)"': (
        "llama/",
        "config/server_args.py",
        "commands/estimate.py",  # its own options, of the same names
    ),
    r"\bCUDA_[A-Z]": ("llama/", "config/server_args.py", "gpus/"),
    r"# -{3,}": (),
}


def modules() -> dict[str, str]:
    """Return the source of every module by its dotted name, without the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    found.pop("__init__")
    return found


MODULES = modules()
FOLDERS = {name for name in ROWS if (PACKAGE / name).is_dir()}


def folder_of(module: str) -> str:
    """Return the folder of a module (`proxy.relay.job` is in `proxy/relay`)."""
    *folder, _file = module.split(".") if module.replace(".", "/") not in FOLDERS else (module, "")
    return "/".join(folder).replace(".", "/") or module


def imports(source: str) -> Iterator[tuple[str, int]]:
    """Yield every module that a source imports, ours without `smartproxy.`, and the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                (alias.name.removeprefix("smartproxy."), node.lineno) for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            for alias in node.names:  # `from smartproxy.state import store` imports a module
                inner = f"{base}.{alias.name}".removeprefix("smartproxy.")
                yield (inner if inner in MODULES else base.removeprefix("smartproxy.")), node.lineno


def problems(module: str, source: str) -> list[str]:
    """Return one line for each import that the module's row forbids."""
    home = folder_of(module)
    rules = ROWS[home]
    found = []
    for name, line in imports(source):
        top = name.split(".")[0]
        if name in MODULES or top in {row.split("/")[0] for row in ROWS}:
            fine = folder_of(name) in {home, *rules.ours}
        elif top in sys.stdlib_module_names:
            fine = top in HARMLESS if rules.pure else rules.subprocess or top != "subprocess"
        else:
            fine = top in rules.packages
        if not fine:
            found.append(f"{module}:{line} may not import {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_folders_row_allows(module: str) -> None:
    assert problems(module, MODULES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("proxy.relay.relay", "import subprocess"),
        ("proxy.relay.relay", "from smartproxy.manager import tick"),
        ("proxy.routes", "from smartproxy.planner import plan"),
        ("manager.tick", "import flask"),
        ("manager.tick", "from smartproxy.proxy.app import create_app"),
        ("planner.place", "import time"),
        ("planner.place", "import logging"),
        ("planner.place", "from smartproxy.state import store"),
        ("memory.estimate", "import os"),
        ("catalog.catalog", "from smartproxy.state.store import Store"),
        ("types", "import smartproxy.config.settings"),
    ],
)
def test_what_a_row_forbids_is_noticed(module: str, source: str) -> None:
    assert problems(module, source)


def test_every_folder_and_file_of_the_front_door_has_a_row() -> None:
    assert {folder_of(module) for module in MODULES} == set(ROWS)


def test_no_module_imports_itself_by_any_way_round() -> None:
    graph = {
        module: {name for name, _ in imports(source) if name in MODULES and name != module}
        for module, source in MODULES.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {error.args[1]}")


def test_rows_make_no_circle() -> None:
    # the workers' application drives the folders in proxy/; those use its small helpers only
    down = {name: row.ours - {"proxy"} for name, row in ROWS.items()}
    tuple(TopologicalSorter(down).static_order())


def test_no_folder_is_a_heap() -> None:
    sizes = Counter(
        folder_of(module) for module in MODULES if module.replace(".", "/") not in FOLDERS
    )
    heaps = {
        folder: size
        for folder, size in sizes.items()
        if folder in FOLDERS and size > MOST_FILES_OF.get(folder, MOST_FILES)
    }
    assert heaps == {}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_says_what_it_knows_and_may_import(folder: str) -> None:
    said = ast.get_docstring(ast.parse(MODULES[folder.replace("/", ".")])) or ""
    assert len(said.splitlines()) in LINES_OF_A_FOLDERS_DOCSTRING
    assert "mport" in said


@pytest.mark.parametrize("pattern", ALONE)
def test_one_place_alone_knows(pattern: str) -> None:
    where = re.compile(pattern, re.MULTILINE)
    strangers = [
        module
        for module, source in MODULES.items()
        if where.search(source)
        and not f"{module.replace('.', '/')}.py".startswith(ALONE[pattern] or ("-",))
    ]
    assert strangers == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_inside_a_function(module: str) -> None:
    late = [
        node.lineno
        for function in ast.walk(ast.parse(MODULES[module]))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and not _optional(node)
    ]
    assert late == []


def _optional(node: ast.Import | ast.ImportFrom) -> bool:
    names = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    )
    return all(name.split(".")[0] in OPTIONAL for name in names)


@pytest.mark.parametrize("module", [m for m in MODULES if ROWS[folder_of(m)].pure])
def test_a_pure_module_opens_and_prints_nothing(module: str) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(MODULES[module]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


def test_an_error_code_is_written_once() -> None:
    codes = set(re.findall(r'code(?:, type)?(?:, \w+)? = \d+, "(\w+)"', MODULES["errors"]))
    assert len(codes) > 10
    again = [
        f"{module}: {code}"
        for module, source in MODULES.items()
        if module != "errors"
        for code in codes
        if f'"{code}"' in source
    ]
    assert again == []
