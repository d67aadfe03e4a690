"""`smartproxy plan MODEL`: what would happen if the model were asked for now, and why.

It asks the running manager through the state file, which only the proxy's own user may read and
write: so it needs neither the proxy's address nor a key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from smartproxy.catalog.catalog import build_catalog
from smartproxy.commands.options import where
from smartproxy.config.load import load_settings
from smartproxy.errors import ManagerDown
from smartproxy.proxy.ask import Question, ask_manager
from smartproxy.state.store import Store

LIMIT_S = 30.0
PARTS = ("weights", "kv_cache", "recurrent", "compute", "overhead", "total")
MEANINGS = {
    "loaded": "is loaded",
    "start": "would be started now",
    "evict": "would be started after others make room",
    "wait": "would wait",
    "refuse": "would be refused",
}


@click.command("plan")
@click.argument("model")
@where
@click.option("--json", "as_json", is_flag=True, help="As GET /api/models/MODEL/plan answers.")
def plan_command(model: str, config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Say where MODEL would go now, which models would make room, and why; changes nothing.

    Sizes are in GB (2^30 bytes).
    """
    settings = load_settings(config, state_dir=state_dir)
    spec = build_catalog(settings).resolve(model)
    path = settings.state_dir / "state.db"
    if not path.exists():
        raise ManagerDown(f"no state file {path}: does `smartproxy serve` run with this state_dir?")
    store = Store(path)
    try:
        question = Question(kind="plan", model_id=spec.id, limit_s=LIMIT_S)
        answer = ask_manager(store, settings.state_dir, question)
    finally:
        store.close_all()
    click.echo(json.dumps(answer, indent=2) if as_json else "\n".join(lines(answer)))


def lines(answer: dict[str, Any]) -> Iterator[str]:
    """Yield a plan's answer as text."""
    yield f"model '{answer['model']}' {MEANINGS[answer['action']]}"
    yield f"  {answer['reason']}"
    placement = answer["placement"]
    if placement is not None and placement["reason"] != answer["reason"]:
        yield f"  then: {placement['reason']}"
    if answer["code"] is not None:
        yield f"  error code: {answer['code']}" + (
            "" if answer["action"] == "refuse" else " (if it still waits at queue_timeout)"
        )
    for victim in answer["evictions"]:
        yield f"  evicts: {victim['reason']}"
    yield ""
    yield _estimate_table(answer["estimate"])
    yield ""
    if answer["candidates"]:
        yield _candidate_table(answer["candidates"])
        yield f"free: without headroom ({answer['headroom_memory']:.2f}) and promised memory"
    else:
        yield "no GPUs: models run on the CPU"


def _estimate_table(estimate: dict[str, Any]) -> str:
    rows = [
        [f"GPU {device['id']}" if device["id"] is not None else "one GPU", *_sizes(device)]
        for device in estimate["devices"]
    ]
    rows.append(["host", *_sizes(estimate["host"])])
    heads = ["estimate, GB", *(part.replace("kv_cache", "KV cache") for part in PARTS)]
    return tabulate(rows, heads, disable_numparse=True, colalign=_alignment(1, len(PARTS)))


def _sizes(device: dict[str, Any]) -> list[str]:
    return [f"{device[f'{part}_memory']:.2f}" for part in PARTS]


def _candidate_table(candidates: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{gpu['id']} {gpu['name']}",
            f"{gpu['free_memory']:.2f}",
            f"{gpu['free_later_memory']:.2f}",
            "-" if gpu["needed_memory"] is None else f"{gpu['needed_memory']:.2f}",
            gpu["note"],
        ]
        for gpu in candidates
    ]
    heads = ["GPU", "free GB", "free later", "needed", "why"]
    aligned = [*_alignment(1, 3), "left"]
    return tabulate(rows, heads, disable_numparse=True, colalign=aligned)


def _alignment(left: int, right: int) -> list[str]:
    return ["left"] * left + ["right"] * right
