"""`smartproxy serve`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from smartproxy.commands.options import remember, where
from smartproxy.config.load import load_settings
from smartproxy.log import setup_logging
from smartproxy.serving.supervisor import serve


@click.command("serve")
@where
@click.option(
    "--host",
    help="Address to listen on, or unix:/path behind nginx. Default: host of the configuration,"
    " else 127.0.0.1.",
)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Default: port of the configuration, else 8000."
)
def serve_command(
    config: Path | None, state_dir: Path | None, host: str | None, port: int | None
) -> None:
    """Run everything: the manager and gunicorn under one parent; Ctrl-C stops all."""
    setup_logging()
    remember(config, state_dir)
    settings = load_settings()
    sys.exit(serve(settings, host or settings.host, port or settings.port))
