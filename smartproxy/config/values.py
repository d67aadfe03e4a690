"""The types of single values in config.json, with their bounds and what they refuse."""

from __future__ import annotations

import json
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

REPO_PATTERN = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
GPU_UUID_PATTERN = re.compile(r"(GPU|MIG)-[!-~]+")
_NAME_RULE = "a name without commas, outer spaces, '/' or '-' in front, '/' at the end"
#: a name, all names below one, or all names
HOST_PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
#: as a browser sends it (RFC 6454): nothing behind the port
ORIGIN_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9_.:\[\]-]+")
API_KEY_PATTERN = re.compile(r"[!-~]+")


def _printable(value: Any) -> Any:
    if isinstance(value, str) and (not value or not value.isprintable()):
        raise ValueError("must be text that is not empty and has no control characters")
    return value


def _absolute(path: Path, info: ValidationInfo) -> Path:
    """Resolve against the configuration file's folder, which load_settings passes as context."""
    folder: Path | None = (info.context or {}).get("folder")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
    return path if folder is None else Path(os.path.abspath(folder / path))


def check_model_name(name: str) -> str:
    """Return the name; raises ValueError if a URL path or `--alias a,b` could not carry it."""
    if not name.isprintable() or "," in name or name != name.strip() or not name.strip("/-"):
        raise ValueError(f"must be {_NAME_RULE}")
    if name[0] in "/-" or name[-1] == "/":
        raise ValueError(f"must be {_NAME_RULE}")
    return name


def _quoted(value: int | str) -> str:
    """Return a value as JSON, its first 100 characters if it is longer."""
    return json.dumps(value if isinstance(value, int) else value[:100], ensure_ascii=False)


def _repo(repo: str) -> str:
    if not REPO_PATTERN.fullmatch(repo):
        raise ValueError(
            f'got {_quoted(repo)}, must be "user/name" (what follows a ":" is the variant)'
        )
    return repo


def _gpu_name(gpu: int | str) -> int | str:
    if gpu < 0 if isinstance(gpu, int) else not GPU_UUID_PATTERN.fullmatch(gpu):
        raise ValueError(f'got {_quoted(gpu)}, must be a GPU number or a uuid such as "GPU-8f2a"')
    return gpu


def _api_key(key: str) -> str:
    if not API_KEY_PATTERN.fullmatch(key):
        raise ValueError("must be a key of visible ASCII characters, without spaces")
    return key


def _host_name(name: str) -> str:
    if not HOST_PATTERN.fullmatch(name):
        raise ValueError(
            f'got {_quoted(name)}, must be a name such as "gpu.example" or "*.example", without'
            " scheme and port"
        )
    return name.lower().removesuffix(".")


def _origin(origin: str) -> str:
    if origin != "*" and not ORIGIN_PATTERN.fullmatch(origin):
        raise ValueError(
            f'got {_quoted(origin)}, must be "*" or a scheme, a host and a port if it is not the'
            ' usual one, such as "https://chat.example"'
        )
    return origin.lower()


Text = Annotated[str, BeforeValidator(_printable)]
FilePath = Annotated[Path, BeforeValidator(_printable), AfterValidator(_absolute)]
ModelName = Annotated[Text, AfterValidator(check_model_name)]
Repo = Annotated[Text, AfterValidator(_repo)]
HostName = Annotated[str, AfterValidator(_host_name)]
Origin = Annotated[str, AfterValidator(_origin)]
ApiKey = Annotated[str, AfterValidator(_api_key)]
GpuName = Annotated[int | str, AfterValidator(_gpu_name)]
#: at most half a year: every timer of the platform takes that
Seconds = Annotated[float, Field(gt=0, le=15_552_000)]
SecondsOrZero = Annotated[float, Field(ge=0, le=15_552_000)]
Port = Annotated[int, Field(ge=1, le=65_535)]
ContextSize = Annotated[int, Field(ge=1, le=2**31 - 1)] | Literal["auto"]
#: llama.cpp's LLAMA_MAX_SEQ
Parallel = Annotated[int, Field(ge=1, le=256)]
GpuLayers = Annotated[int, Field(ge=-1, le=2**31 - 1)]
CacheBits = Literal[16, 8, 4]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


def only_this_machine(host: str) -> bool:
    """Return whether an address that is listened on can be reached from this machine alone.

    A name that is not `localhost` may be any address: it counts as open.
    """
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
