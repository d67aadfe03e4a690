"""`smartproxy pause`: have new requests queue; requests in flight finish, and nothing fails.

It writes into the state file, which only the proxy's own user may: so it needs neither the proxy's
address nor a key, and works while the proxy is down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from smartproxy.commands.options import where
from smartproxy.config.load import load_settings
from smartproxy.errors import ManagerDown
from smartproxy.state import manager_row
from smartproxy.state.store import Store


@contextlib.contextmanager
def state_of(state_dir: Path) -> Iterator[Store]:
    """Open the state file for the length of a block. Raises ManagerDown if there is none."""
    path = state_dir / "state.db"
    if not path.exists():
        raise ManagerDown(f"no state file {path}: has `smartproxy serve` run with this state_dir?")
    store = Store(path)
    try:
        yield store
    finally:
        store.close_all()


@click.command("pause")
@where
def pause_command(config: Path | None, state_dir: Path | None) -> None:
    """Have new requests queue until `smartproxy resume`; requests in flight finish."""
    settings = load_settings(config, state_dir=state_dir)
    with state_of(settings.state_dir) as store:
        manager_row.pause(store, now=store.now())
    click.echo("paused: new requests queue, no model is loaded; `smartproxy resume` ends it")
