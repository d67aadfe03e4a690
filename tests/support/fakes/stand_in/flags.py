"""llama-server's command line: which flags there are, which take a value, what the help says.

`flags.txt` lists the flags of builds b10434 and b10068 together, one option a line in all its
spellings, as `--help` prints them (a test compares it with the installed binary).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: accepted, but in no help text: the stand-in's own
KNOBS_FLAG = "--fake"
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_SWITCHES = ("on", "off", "auto", "enabled", "disabled", "true", "false", "0", "1", "-1")
_LEVELS = ("generic output", "error", "warning", "info", "trace (more info)", "debug")
_INTEGERS: tuple[str, ...] = (
    "--ctx-size",
    "--port",
    "--parallel",
    "--batch-size",
    "--ubatch-size",
    "--verbosity",
)
_INTEGERS += ("--threads", "--threads-http", "--timeout", "--main-gpu", "--n-cpu-moe")


class BadFlag(ValueError):
    """The text the real server prints before it ends with status 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    spellings: tuple[str, ...]
    #: what --help writes for the value; "" for a switch
    value: str


def _negative(spelling: str) -> bool:
    return spelling.startswith(("--no-", "-no-", "-n")) and spelling not in ("-n", "-np", "-ngl")


def _read_flags() -> tuple[Flag, ...]:
    lines = (Path(__file__).parent / "flags.txt").read_text().splitlines()
    flags = []
    for line in lines:
        spellings = re.match(r"(?:--?[\w.-]+(?:, |$| ))+", line)
        assert spellings is not None, line
        names = tuple(spellings.group(0).replace(",", " ").split())
        flags.append(Flag(spellings=names, value=line[spellings.end() :].strip()))
    return tuple(flags)


FLAGS = _read_flags()
_BY_SPELLING = {spelling: flag for flag in FLAGS for spelling in flag.spellings}


class Options:
    """The parsed command line, asked by any spelling."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, ...], str] = {}
        self.knobs: list[str] = []

    def set(self, flag: Flag, value: str) -> None:
        self._values[flag.spellings] = value

    def text(self, spelling: str, default: str = "") -> str:
        return self._values.get(_BY_SPELLING[spelling].spellings, default)

    def number(self, spelling: str, default: int) -> int:
        text = self.text(spelling)
        return int(text) if text else default

    def on(self, spelling: str, default: bool = False) -> bool:
        text = self.text(spelling)
        return text == "on" if text else default


def parse(argv: list[str]) -> Options:
    """Return the options; raises BadFlag with the real server's words."""
    options = Options()
    rest = list(argv)
    while rest:
        spelling = rest.pop(0)
        if spelling == KNOBS_FLAG:
            options.knobs.append(rest.pop(0))
            continue
        flag = _BY_SPELLING.get(spelling)
        if flag is None:
            raise BadFlag(f"error: invalid argument: {spelling}")
        if not flag.value:
            options.set(flag, "off" if _negative(spelling) else "on")
            continue
        if not rest:
            raise _bad_value(spelling, "expected value for argument")
        value = rest.pop(0)
        _check_value(flag, spelling, value)
        options.set(flag, value)
    return options


def _check_value(flag: Flag, spelling: str, value: str) -> None:
    names = set(flag.spellings)
    if names & set(_INTEGERS) and not re.match(r"-?\d+", value):
        raise _bad_value(spelling, "stoi")
    if "--gpu-layers" in names and not re.match(r"-?\d+|auto$|all$", value):
        raise _bad_value(spelling, "stoi")
    if names & {"--cache-type-k", "--cache-type-v"} and value not in CACHE_TYPES:
        raise _bad_value(spelling, f"Unsupported cache type: {value}")
    if names & {"--fit", "--flash-attn"} and value not in _SWITCHES:
        raise _bad_value(spelling, f"error: unknown value for {flag.spellings[-1]}: '{value}'")
    if "--parallel" in names and int(value) == 0:
        raise _bad_value(spelling, "error: invalid value for n_parallel")
    if "--tensor-split" in names and len(re.split(r"[,/]+", value)) > 16:
        raise _bad_value(spelling, "got more than 16 input configs")


def _bad_value(spelling: str, why: str) -> BadFlag:
    return BadFlag(f'error while handling argument "{spelling}": {why}\n\nusage:')


def help_text() -> str:
    """Return what --help prints: every flag in the real layout, without the explanations."""
    lines = ["----- common params -----", ""]
    for flag in FLAGS:
        head = ", ".join(flag.spellings) + (f" {flag.value}" if flag.value else "")
        lines.append(head if len(head) > 38 else f"{head:<40}(stand-in)")
        if "--log-verbosity" in flag.spellings:
            lines += [f"{'':<40} - {level}: {name}" for level, name in enumerate(_LEVELS)]
    lines += ["", "----- stand-in params -----", ""]
    lines.append(
        f"{KNOBS_FLAG + ' KEY=VALUE,...':<40}bad manners, see tests/support/fakes/stand_in/knobs.py"
    )
    return "\n".join(lines)
