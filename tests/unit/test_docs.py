"""What the documents say of the configuration is what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from smartproxy.config.legacy import translate
from smartproxy.config.load import ModelSettings, ServerPool, Settings, load_settings
from tests.support.paths import ROOT

REPOSITORY = ROOT
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
README = REPOSITORY / "README.md"
NGINX_CONF = REPOSITORY / "deploy" / "nginx.conf"

#: first cell of a table's head -> what it must list completely
TABLES: dict[str, type[BaseModel]] = {
    "key": Settings,
    "key of `server_pool`": ServerPool,
    "key of a model": ModelSettings,
}
#: a model's key that follows a general one of another name
FOLLOWS = {"strategy": "gpu_allocation_strategy"}


@dataclass(frozen=True)
class Table:
    head: str
    #: key -> what its default cell starts with
    defaults: dict[str, str]
    #: key -> what its last cell says
    sentences: dict[str, str]


def tables(text: str) -> Iterator[Table]:
    """Yield the Markdown tables whose first two columns are keys and defaults."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        )
        if head[1] != "default":
            continue
        found: dict[str, str] = {}
        sentences: dict[str, str] = {}
        for cells in rows:
            keys, defaults = re.findall(r"`(\w+)`", cells[0]), cells[1].split(", ")
            if len(defaults) == 1:
                defaults *= len(keys)
            found |= dict(zip(keys, defaults, strict=True))
            sentences |= dict.fromkeys(keys, cells[2])
        yield Table(head[0], found, sentences)


def written_default(model: type[BaseModel], key: str) -> str:
    """Return how a key's true default is written in a table."""
    if model is ModelSettings and FOLLOWS.get(key, key) in Settings.model_fields:
        return "general"
    default = model.model_fields[key].default
    if isinstance(default, BaseModel):
        return "see below"
    return "none" if default in (None, (), {}) else f"`{json.dumps(_plain(default))}`"


def _plain(default: object) -> object:
    return str(default) if isinstance(default, Path) else default


def wrong(text: str, heads: set[str]) -> list[str]:
    """Return what a document's tables have wrong: keys, defaults, or a table that is missing."""
    found = {table.head: table for table in tables(text)}
    problems = [f"no table of {head!r}" for head in heads - found.keys()]
    for head in heads & found.keys():
        model, defaults = TABLES[head], found[head].defaults
        problems += [f"{key} is missing" for key in model.model_fields.keys() - defaults.keys()]
        problems += [f"{key} is no key" for key in defaults.keys() - model.model_fields.keys()]
        for key in defaults.keys() & model.model_fields.keys():
            expected = written_default(model, key)
            if defaults[key] != expected and not defaults[key].startswith(f"{expected} "):
                problems.append(f"{key}: says {defaults[key]}, is {expected}")
            sentence = " ".join((model.model_fields[key].description or "").split())
            if not f"{found[head].sentences[key]} ".startswith(f"{sentence} "):
                problems.append(f"{key}: the settings say {sentence!r}")
    return problems


def test_configuration_page_names_every_key_with_its_default_and_sentence() -> None:
    assert wrong(CONFIGURATION.read_text(encoding="utf-8"), set(TABLES)) == []


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_readme_names_every_key_with_its_default_and_sentence() -> None:
    assert wrong(README.read_text(encoding="utf-8"), {"key"}) == []


def test_wrong_tables_are_noticed() -> None:
    page = CONFIGURATION.read_text(encoding="utf-8")
    for changed, said in [
        (page.replace("| `ctx_size` | `8192`", "| `ctx_size` | `2048`"), "ctx_size: says `2048`"),
        (page.replace("| `max_queue` |", "| `max_queues` |"), "max_queue is missing"),
        (page.replace("| `max_queue` |", "| `max_queues` |"), "max_queues is no key"),
        (page.replace("| key of a model |", "| keys |"), "no table of 'key of a model'"),
        (page.replace("Load it at start.", "Load it."), "preload: the settings say 'Load it at"),
    ]:
        assert any(problem.startswith(said) for problem in wrong(changed, set(TABLES))), said


def test_several_keys_may_share_a_row() -> None:
    text = (
        "| key | default | |\n|---|---|---|\n| `a`, `b` | `1`, none | x |\n| `c`, `d` | `2` | |\n"
    )
    (table,) = tables(text)
    assert table.defaults == {"a": "`1`", "b": "none", "c": "`2`", "d": "`2`"}


def test_nginx_lets_answers_name_the_ports_of_the_default_pool_and_no_others() -> None:
    (pattern,) = re.findall(r'"~(\^127.*)" \$sp_named;', NGINX_CONF.read_text(encoding="utf-8"))
    allowed = [port for port in range(100_000) if re.search(pattern, f"127.0.0.1:{port}")]
    assert allowed == list(ServerPool().ports)
    shown = f"{allowed[0]}-{allowed[-1]}"
    for page in (NGINX_CONF, README, CONFIGURATION, REPOSITORY / "docs" / "datapath.md"):
        assert shown in page.read_text(encoding="utf-8"), page


def examples() -> list[str]:
    page = CONFIGURATION.read_text(encoding="utf-8")
    return re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", examples())
def test_examples_load(tmp_path: Path, example: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(example)
    assert load_settings(path, environ={}).warnings == ()


def test_every_older_key_of_the_page_is_understood() -> None:
    page = CONFIGURATION.read_text(encoding="utf-8").split("## Older forms")[1]
    olds = [
        key
        for line in page.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`([\w.]+)`", line.split("|")[1])
    ]
    assert len(olds) > 15
    for old in olds:
        section, _, key = old.rpartition(".")
        value: object = {} if key in ("models", "ollama") else 1
        content = {section: {key: value}} if section else {key: value}
        if old not in ("ollama", "gpu", "server_pool"):  # named as the owners of other keys
            assert translate(content).warnings, old
