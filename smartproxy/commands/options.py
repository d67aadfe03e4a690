"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path

import click


def where(command: click.decorators.FC) -> click.decorators.FC:
    """Add --config and --state-dir."""
    command = click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="Default: SMARTPROXY_CONFIG, else config.json.",
    )(command)
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Default: SMARTPROXY_STATE_DIR, else the configuration's state_dir.",
    )(command)


def remember(config: Path | None, state_dir: Path | None) -> None:
    """Put them where every process that is started finds them: in the environment."""
    if config is not None:
        os.environ["SMARTPROXY_CONFIG"] = str(config.absolute())
    if state_dir is not None:
        os.environ["SMARTPROXY_STATE_DIR"] = str(state_dir.absolute())
