"""The command line: `smartproxy serve`, and the halves and tools by themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from smartproxy.config import load_settings
from smartproxy.errors import SmartProxyError
from smartproxy.estimate_command import estimate_command
from smartproxy.gpus_command import gpus_command
from smartproxy.log import setup_logging
from smartproxy.manager.__main__ import main as run_manager
from smartproxy.plan_command import plan_command
from smartproxy.serve import serve as run_serve

EXIT_BAD_CONFIG = 2


@click.group()
@click.version_option(package_name="llama-smart-proxy")
def cli() -> None:
    """One OpenAI-compatible address for many GGUF models."""


def _where(command: click.decorators.FC) -> click.decorators.FC:
    """Add --config and --state-dir; they reach every process through the environment."""
    command = click.option(
        "--config", type=click.Path(path_type=Path), help="Default: SMARTPROXY_CONFIG, config.json."
    )(command)
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Default: SMARTPROXY_STATE_DIR, the configuration's state_dir.",
    )(command)


def _remember(config: Path | None, state_dir: Path | None) -> None:
    if config is not None:
        os.environ["SMARTPROXY_CONFIG"] = str(config.absolute())
    if state_dir is not None:
        os.environ["SMARTPROXY_STATE_DIR"] = str(state_dir.absolute())


@cli.command()
@_where
@click.option(
    "--host",
    help="Address to listen on, or unix:/path for an nginx in front; default: the configuration's,"
    " 127.0.0.1.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the configuration's, 8000.")
def serve(config: Path | None, state_dir: Path | None, host: str | None, port: int | None) -> None:
    """Run everything: the manager and gunicorn under one parent; Ctrl-C stops all."""
    setup_logging()
    _remember(config, state_dir)
    settings = load_settings()
    sys.exit(run_serve(settings, host or settings.host, port or settings.port))


@cli.command()
@_where
def manager(config: Path | None, state_dir: Path | None) -> None:
    """Run the manager alone (systemd runs gunicorn beside it)."""
    _remember(config, state_dir)
    sys.exit(run_manager())


cli.add_command(estimate_command, "estimate")
cli.add_command(plan_command, "plan")
cli.add_command(gpus_command, "gpus")


def main() -> None:
    """Entry point; an error of ours is one line, never a traceback."""
    try:
        cli()
    except SmartProxyError as error:
        click.echo(f"smartproxy: {error}", err=True)
        sys.exit(EXIT_BAD_CONFIG)


if __name__ == "__main__":
    main()
