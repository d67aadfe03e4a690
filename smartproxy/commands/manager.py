"""`smartproxy manager`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from smartproxy.commands.options import remember, where
from smartproxy.manager.__main__ import main


@click.command("manager")
@where
def manager_command(config: Path | None, state_dir: Path | None) -> None:
    """Run the manager alone (systemd runs gunicorn beside it)."""
    remember(config, state_dir)
    sys.exit(main())
