"""`smartproxy resume`: serve the requests that queue since `smartproxy pause`."""

from __future__ import annotations

from pathlib import Path

import click

from smartproxy import doorbell
from smartproxy.commands.options import where
from smartproxy.commands.pause import state_of
from smartproxy.config.load import load_settings
from smartproxy.state import manager_row


@click.command("resume")
@where
def resume_command(config: Path | None, state_dir: Path | None) -> None:
    """Serve the requests that queue since `smartproxy pause`."""
    settings = load_settings(config, state_dir=state_dir)
    with state_of(settings.state_dir) as store:
        paused_s = manager_row.resume(store, now=store.now())
    doorbell.ring(settings.state_dir, b"resume")
    click.echo("was not paused" if paused_s is None else f"resumed after {paused_s:.0f} s")
