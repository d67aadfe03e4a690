"""The configuration in force changes as a whole, for who asks next."""

from __future__ import annotations

from pathlib import Path

from smartproxy.catalog.live import Live
from smartproxy.config.settings import ModelSettings, Settings


def settings(*names: str, **more: object) -> Settings:
    models = {name: ModelSettings(path=Path(f"{name}.gguf")) for name in names}
    return Settings.model_validate({"models": models, **more})


def test_who_asked_before_keeps_what_was_in_force_then() -> None:
    live = Live(settings("a", max_queue=3))
    before = live.now
    live.put(settings("a", "b", max_queue=4))
    assert set(live.catalog.models) == {"a", "b"}
    assert live.settings.max_queue == 4
    assert set(before.catalog.models) == {"a"}
    assert before.settings.max_queue == 3
