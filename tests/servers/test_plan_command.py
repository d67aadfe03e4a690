"""`smartproxy plan` and GET /api/models/<id>/plan: answers of a running manager, and of none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from smartproxy.commands.plan import lines
from smartproxy.errors import ManagerDown
from smartproxy.proxy.ask import Question, ask_manager
from smartproxy.state.migrate import create
from tests.support.gpu_running import Card, cli_environment, gpu_machine, model, plan, world_of
from tests.support.running import Proxy, fake_model, running, wait_until


def command(proxy: Proxy, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smartproxy.cli", "plan", *arguments],
        env=cli_environment(proxy),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_all_that_a_plan_can_say_is_said_in_words_and_numbers(tmp_path: Path) -> None:
    models = {
        "old": model(tmp_path, "old", 6),
        "new": model(tmp_path, "new", 4, config={"aliases": ["neu"]}),
        "huge": model(tmp_path, "huge", 20),
        "lost": {"path": str(tmp_path / "lost.gguf")},
    }
    with gpu_machine(tmp_path, world_of(Card(gib=8)), models) as (proxy, _):
        assert proxy.chat("old").status_code == 200
        # its lease lingers for a moment
        wait_until(lambda: plan(proxy, "new")["action"] == "evict", what="old is idle")
        evicting = plan(proxy, "new")
        assert evicting["code"] == "gpu_memory_busy"
        assert [victim["model"] for victim in evicting["evictions"]] == ["old"]
        assert evicting["candidates"][0]["note"].startswith("no room: 4.")
        parts = evicting["estimate"]["devices"][0]
        assert parts["total_memory"] == pytest.approx(
            sum(size for name, size in parts.items() if name not in ("id", "total_memory")),
            abs=0.01,
        )
        refused = plan(proxy, "huge")
        assert (refused["action"], refused["code"]) == ("refuse", "insufficient_gpu_memory")
        assert "largest set of GPUs has 7.8 GB" in refused["reason"]
        assert plan(proxy, "old")["action"] == "loaded"
        # nothing of it was done
        assert proxy.states() == {"old": "ready"}
        assert proxy.rows("SELECT * FROM demands") == []

        said = command(proxy, "neu")
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith("model 'new' would be started after others make room\n")
        assert "evicts: model 'old' makes room for 'new'" in said.stdout
        as_json = command(proxy, "new", "--json")
        assert json.loads(as_json.stdout)["evictions"][0]["model"] == "old"

        unknown = command(proxy, "nwe")
        assert unknown.returncode == 2
        assert 'nearest: "new"' in unknown.stderr
        unreadable = requests.get(f"{proxy.url}/api/models/lost/plan", timeout=60)
        assert unreadable.json()["error"]["code"] == "model_load_failed"
        no_verb = requests.get(f"{proxy.url}/api/models/old/plans", timeout=60)
        assert no_verb.json()["error"]["code"] == "not_found"


def test_without_a_gpu_the_plan_is_the_cpu(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        told = plan(proxy, "m")
        assert (told["action"], told["candidates"]) == ("start", [])
        assert "there is no GPU" in told["reason"]
        text = "\n".join(lines(told))
        assert "no GPUs: models run on the CPU" in text
        assert "GPU 0" not in text


def test_a_plan_without_a_manager_is_an_error(tmp_path: Path) -> None:
    store, _ = create(tmp_path / "state.db")
    question = Question(kind="plan", model_id="m", limit_s=10, patience_s=0.05)
    with pytest.raises(ManagerDown, match="does not answer"):
        ask_manager(store, tmp_path, question)
    assert store.read("SELECT * FROM demands") == []
