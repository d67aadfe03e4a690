"""What a server's log says: its end, and the line that best explains why it ended."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

TAIL_BYTES = 65_536


#: in order of how well they explain an end; llama-server's last line seldom does
TELLING = (
    # without pinned memory it only works more slowly
    re.compile(
        r"^(?!.*pinned memory).*(?:out of memory|insufficient memory|(?:failed|unable) to allocate"
        r"|memory allocation of size|cannot allocate memory)",
        re.I,
    ),
    re.compile(r"error loading model|invalid argument|error while handling argument", re.I),
    re.compile(r"couldn't bind|CUDA error|GGML_ASSERT|terminate called|unknown model", re.I),
    re.compile(r"^(?:[\d.]+ )?E |\berror\b|\bfailed\b", re.I),
)


PREFIX = re.compile(r"^(?:[\d.]+ [A-Z] )?(?:(?:srv|slot|cmn|llama)\s+)?")


PORT_TAKEN = re.compile(r"couldn't bind HTTP server socket")


SIGNALS = {
    signal.SIGILL: "it uses CPU instructions that this machine lacks; install another build",
    signal.SIGKILL: "killed, perhaps by the kernel for want of memory (see dmesg)",
    signal.SIGABRT: "it aborted",
    signal.SIGSEGV: "it crashed",
}


def tail(log_path: Path) -> str:
    """Return the end of a log, or nothing when there is none."""
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def last_useful_line(log: str) -> str:
    """Return the line of a log that best says why a server ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in TELLING:
        for line in lines:
            if pattern.search(line):
                return PREFIX.sub("", line)[:500]
    return PREFIX.sub("", lines[-1])[:500] if lines else "its log is empty"


def explain_exit(exit_code: int | None, log: str) -> str:
    """Return in words why a server ended: exit code or signal, and the telling log line."""
    if exit_code is None:
        how = "ended"
    elif exit_code < 0:
        number = signal.Signals(-exit_code)
        how = f"ended by {number.name}"
        if number in SIGNALS:
            how += f" ({SIGNALS[number]})"
    else:
        how = f"exited with code {exit_code}"
    return f"{how}: {last_useful_line(log)}"
