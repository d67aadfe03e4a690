"""deploy/grafana.json: every query names metrics and labels that the proxy really has."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from tests.support.paths import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
#: the names of /metrics and their labels; kinds as values
METRICS: dict[str, dict[str, set[str]]] = {
    "smartproxy_gpu_memory_bytes": {
        "gpu": set(),
        "uuid": set(),
        "kind": {"total", "used", "free", "reserved"},
    },
    "smartproxy_gpu_utilization_percent": {"gpu": set(), "uuid": set()},
    "smartproxy_gpu_temperature_celsius": {"gpu": set(), "uuid": set()},
    "smartproxy_gpu_power_watts": {"gpu": set(), "uuid": set()},
    "smartproxy_gpu_up": {"gpu": set(), "uuid": set()},
    "smartproxy_server_memory_bytes": {
        "model": set(),
        "gpu": set(),
        "kind": {"estimated", "measured"},
    },
    "smartproxy_server_requests_processing": {"model": set()},
    "smartproxy_server_slots": {"model": set(), "kind": {"busy", "total"}},
    "smartproxy_server_tokens_total": {"model": set(), "kind": {"prompt", "predicted"}},
    "smartproxy_requests_total": {"model": set(), "code": set()},
    "smartproxy_loads_total": {"model": set(), "outcome": set()},
    "smartproxy_evictions_total": {},
    "smartproxy_load_seconds": {"model": set()},
    "smartproxy_queue_length": {},
    "smartproxy_decision_seconds": {},
}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = DASHBOARD["templating"]["list"]


def metrics_in(text: str) -> list[str]:
    return re.findall(r"\bsmartproxy_\w+", text)


def test_every_metric_named_anywhere_exists() -> None:
    assert set(metrics_in(json.dumps(DASHBOARD))) <= set(METRICS)


def test_every_metric_is_shown() -> None:
    assert {name for query in QUERIES for name in metrics_in(query)} == set(METRICS)


@pytest.mark.parametrize("query", QUERIES)
def test_query_selects_by_labels_that_the_metric_has(query: str) -> None:
    selections = re.findall(r"(smartproxy_\w+)\{([^}]*)\}", query)
    for name, selectors in selections:
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selectors):
            assert label in METRICS[name], (name, label)
            kinds = METRICS[name][label]
            assert not kinds or value in kinds, (name, label, value)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legend_names_labels_that_the_query_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"]
        grouped = re.search(r"sum by \(([^)]*)\)", query)
        kept = set(METRICS[metrics_in(query)[0]])
        if grouped:
            kept = {label.strip() for label in grouped.group(1).split(",")}
        used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert used <= kept, (query, used)


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_shown_as_rates(query: str) -> None:
    for name in metrics_in(query):
        if name.endswith("_total"):
            assert re.search(rf"(rate|increase)\({name}", query)


@pytest.mark.parametrize("query", QUERIES)
def test_brackets_match_and_variables_exist(query: str) -> None:
    depth = {"(": ")", "{": "}", "[": "]"}
    waiting: list[str] = []
    for sign in re.sub(r'"[^"]*"', "", query):
        if sign in depth:
            waiting.append(depth[sign])
        elif sign in depth.values():
            assert waiting.pop() == sign
    assert not waiting
    known = {variable["name"] for variable in VARIABLES} | {"__rate_interval"}
    assert set(re.findall(r"\$(\w+)", query)) <= known


def test_gpu_memory_utilisation_temperature_power_and_load_by_model_are_there() -> None:
    wanted = {"GPU memory used", "GPU utilisation", "GPU temperature", "GPU power"}
    wanted |= {"Requests in progress", "Slots busy", "Tokens per second"}
    assert wanted <= {panel["title"] for panel in PANELS}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for one, other in combinations((panel["gridPos"] for panel in everything), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in everything)
