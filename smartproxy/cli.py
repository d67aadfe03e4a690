"""The command line: `smartproxy COMMAND`."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from smartproxy.errors import SmartProxyError

EXIT_BAD_CONFIG = 2


class Commands(click.Group):
    """Commands whose modules are loaded when they are asked for.

    `serve` stays for as long as the proxy runs: it should not carry what the other commands need.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["serve", "manager", "plan", "gpus", "estimate", "pause", "resume"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"smartproxy.commands.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


@click.group(cls=Commands)
@click.version_option(package_name="llama-smart-proxy")
def cli() -> None:
    """One OpenAI-compatible address for many GGUF models."""


def main() -> None:
    """Entry point; an error of ours is one line, never a traceback."""
    try:
        cli()
    except SmartProxyError as error:
        click.echo(f"smartproxy: {error}", err=True)
        sys.exit(EXIT_BAD_CONFIG)


if __name__ == "__main__":
    main()
