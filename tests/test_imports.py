"""DESIGN.md's module table: who may import whom, read off the source of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "smartproxy"

#: parts of manager that compute and nothing else; whatever of manager they import must be so too
PURE = (
    *("estimate", "place", "evict", "plan"),
    *("architectures", "compute_buffer", "buffer_lines", "learning", "extra_args"),
)
#: parts of manager that read GGUF files; they alone may use gguf
METADATA = {"metadata", "gguf_header", "model_keys", "tensor_sums", "projector"}
CONFIG = {
    *("entities", "config", "legacy", "catalog"),
    *("settings", "setting_types", "flags", "config_errors", "scan", "gguf_kind"),
}
#: of the standard library, what has no clock, disk, network, process or log in it
HARMLESS = {
    *("__future__", "math", "dataclasses", "collections", "typing", "enum", "functools"),
    *("itertools", "bisect", "heapq", "operator", "re", "struct", "types"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. Standard library: all of it but `never`, or only `harmless`."""

    #: kinds of our own modules
    ours: frozenset[str]
    packages: frozenset[str] = frozenset()
    never: frozenset[str] = field(default=frozenset({"subprocess"}))
    harmless: bool = False


def row(ours: str, packages: str = "", never: str = "subprocess", harmless: bool = False) -> Row:
    return Row(
        ours=frozenset(ours.split()),
        packages=frozenset(packages.split()),
        never=frozenset(never.split()),
        harmless=harmless,
    )


TABLE = {
    "types": row("types", harmless=True),
    "cuda": row("types", harmless=True),
    "log": row(""),
    "lifetime": row("types", "psutil"),
    "config": row("types config", "pydantic"),
    "state": row("types state", "sqlite_utils"),
    "proxy": row(
        "types config log state proxy lifetime",
        "flask werkzeug gunicorn requests urllib3 orjson prometheus_client tabulate yaml",
    ),
    "pure": row("types cuda pure", harmless=True),
    "observe": row("types", "pynvml"),
    "metadata": row("types cuda metadata pure", "gguf numpy"),
    "manager": row(
        "types cuda config log state lifetime pure observe metadata manager",
        "apscheduler psutil requests urllib3",
        never="",
    ),
    "cli": row(
        "types cuda config log state lifetime proxy pure metadata manager cli",
        "click tabulate requests gunicorn psutil",
        never="",
    ),
}
#: packages that may be missing, and so may be imported inside a function
OPTIONAL = {"pynvml", "orjson"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def kind_of(module: str) -> str:
    """Return the row of a module; raises LookupError for one that has none."""
    _, *path = module.split(".")
    match path:
        case []:
            return "types"  # the package itself: a version, no more
        case ["types" | "need_types" | "plan_types" | "errors"]:
            return "types"
        case ["gpus", *_]:
            return "cuda"
        case ["log" | "lifetime" as name]:
            return name
        case [
            "cli"
            | "serve"
            | "listen"
            | "guard"
            | "__main__"
            | "command_options"
            | "serve_command"
            | "manager_command"
            | "estimate_command"
            | "estimate_views"
            | "gpus_command"
            | "plan_command",
            *_,
        ]:
            return "cli"
        case [name] if name in CONFIG:
            return "config"
        case ["state" | "proxy" as name, *_]:
            return name
        case ["manager", "observe"]:
            return "observe"
        case ["manager", _, *_] if module in pure_modules():
            return "pure"
        case ["manager", name, *_] if name in METADATA:
            return "metadata"
        case ["manager", *_]:
            return "manager"
    raise LookupError(f"{module} is in no row of DESIGN.md's module table")


@cache
def pure_modules() -> frozenset[str]:
    """Return the pure modules of manager and, however deep, those of manager they lean on."""
    found: set[str] = set()
    waiting = [f"smartproxy.manager.{name}" for name in PURE]
    while waiting:
        module = waiting.pop()
        if module not in found and module in MODULES:
            tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
            leans_on = {name for name, _ in imports(tree, module, set(MODULES))}
            waiting += [name for name in leans_on if name.startswith("smartproxy.manager.")]
            found.add(module)
    return frozenset(found)


def imports(tree: ast.Module, module: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """Yield every module imported, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            source = node.module or ""
            for alias in node.names:  # `from smartproxy.state import store` imports a module
                inner = f"{source}.{alias.name}"
                yield (inner if inner in known else source), node.lineno


def problems(module: str, source: str, known: set[str]) -> list[str]:
    """Return one line for each import of this source that the table forbids."""
    rules = TABLE[kind_of(module)]
    tree = ast.parse(source)
    found = []
    for name, line in imports(tree, module, known):
        top = name.split(".")[0]
        if top == "smartproxy":
            fine = kind_of(name) in rules.ours or name == module
        elif top in sys.stdlib_module_names:
            fine = top in HARMLESS if rules.harmless else top not in rules.never
        else:
            fine = top in rules.packages
        if not fine:
            found.append(f"{module}:{line} may not import {name}")
    return found + _late_imports(module, tree) + _open_calls(module, tree, rules)


def _late_imports(module: str, tree: ast.Module) -> list[str]:
    return [
        f"{module}:{node.lineno} imports inside a function"
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and not _optional(node)
    ]


def _optional(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in OPTIONAL
    return all(alias.name.split(".")[0] in OPTIONAL for alias in node.names)


def _open_calls(module: str, tree: ast.Module, rules: Row) -> list[str]:
    if not rules.harmless:
        return []
    return [
        f"{module}:{node.lineno} calls {node.func.id}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"open", "print", "input", "exec", "eval", "__import__"}
    ]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_row_allows(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert problems(module, source, set(MODULES)) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("smartproxy.proxy.relay", "import subprocess", "may not import subprocess"),
        ("smartproxy.proxy.relay", "from smartproxy.manager import tick", "may not import"),
        ("smartproxy.proxy.relay", "import pynvml", "may not import pynvml"),
        ("smartproxy.manager.tick", "import flask", "may not import flask"),
        ("smartproxy.manager.tick", "from smartproxy.proxy.app import x", "smartproxy.proxy.app"),
        ("smartproxy.manager.tick", "import pynvml", "may not import pynvml"),
        ("smartproxy.manager.place", "import time", "may not import time"),
        ("smartproxy.manager.place", "import logging", "may not import logging"),
        ("smartproxy.manager.place", "from smartproxy.state import store", "smartproxy.state"),
        ("smartproxy.manager.place", "from smartproxy import config", "may not import"),
        ("smartproxy.manager.place", "open('x')", "calls open"),
        ("smartproxy.manager.observe", "import smartproxy.state.fleet", "may not import"),
        ("smartproxy.config", "import flask", "may not import flask"),
        ("smartproxy.catalog", "from smartproxy.state.store import Store", "may not import"),
        ("smartproxy.state.store", "from smartproxy.config import Settings", "may not import"),
        ("smartproxy.types", "import smartproxy.config", "may not import smartproxy.config"),
        ("smartproxy.types", "if x:\n    import smartproxy.config", "may not import"),
        ("smartproxy.state.store", "def f():\n    import json", "imports inside a function"),
    ],
)
def test_what_the_table_forbids_is_noticed(module: str, source: str, said: str) -> None:
    known = {*MODULES, "smartproxy.manager.tick", "smartproxy.state.store"}
    assert any(said in problem for problem in problems(module, source, known))


def test_module_of_no_row_is_noticed() -> None:
    with pytest.raises(LookupError, match="helpers is in no row"):
        kind_of("smartproxy.helpers")
