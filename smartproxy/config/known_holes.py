"""What a safe start should know of: llama-server builds with known holes, arguments that open it,
and keys that leave operations to clients. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from smartproxy.config.server_args import spelled_out

#: "b10434 (7e4c0a9)", "10434 (7e4c0a9)", "1 (571d0d5), b10068"; a commit has seven digits
BUILD_NUMBER = re.compile(r"\bb?(\d{4,6})\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A fault of llama-server that a client can use, and the builds that have it."""

    name: str
    builds: range
    what: str


HOLES = (
    Hole(
        name="CVE-2026-107183",
        builds=range(8227, 11393),
        what="POST /completion can use memory after it was freed",
    ),
)


def build_number(build: str) -> int | None:
    """Return the number of a build by what it says of itself; None: it says none."""
    found = BUILD_NUMBER.search(build)
    return int(found[1]) if found else None


def build_problems(build: str | None) -> list[str]:
    """Return one line for each known hole of a build; of one without number nothing is known."""
    number = build_number(build or "")
    return [
        f"llama-server b{number} has a known hole ({hole.name}: {hole.what});"
        f" use b{hole.builds.stop} or later"
        for hole in HOLES
        if number in hole.builds
    ]


def _each(spellings: str, what: str) -> dict[str, str]:
    return dict.fromkeys(spellings.split(), what)


#: arguments that let every client do more than ask a model, and what that is
DANGEROUS: Mapping[str, str] = {
    **_each("--tools", "it lets every client run tools on this machine"),
    **_each("-ag --agent", "it lets every client run tools on this machine"),
    **_each("--ui-mcp-proxy --webui-mcp-proxy", "it lets every client send requests from here"),
    **_each("--mcp-servers-config", "it starts programs for every client"),
    **_each("--media-path", "it lets every client read the files below it"),
    **_each("--path", "it gives the files below it to every client"),
    **_each("--slot-save-path", "it lets every client write files there and load crafted ones"),
    **_each("--rpc", "it sends the model and all prompts to other hosts, unprotected"),
    **_each("--log-prompts-dir", "it writes every client's prompts to files"),
    **_each("--props", "it lets every client change the server for all others"),
}


def dangerous_args(args: Iterable[str]) -> list[str]:
    """Return the arguments that open a server to every client, each with what it opens."""
    return [f"{arg}: {DANGEROUS[flag]}" for arg in args if (flag := spelled_out(arg)) in DANGEROUS]
