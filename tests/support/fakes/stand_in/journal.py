"""What a stand-in saw, as one JSON object a line, for tests to read.

Every line has `event`, `t` (Unix seconds) and `pid`; events: started (argv, env, cwd), ready,
request (method, path, headers, body_bytes, body_sha256, body where it is short), answered,
cancelled (the client left), signal, crash, exit. Several stand-ins may share a file: a line is one
write.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

SHORT_BODY_BYTES = 4096


class Journal:
    """Appends to the file, or does nothing where there is none."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600) if path else -1

    def write(self, event: str, **more: object) -> None:
        if self._fd < 0:
            return
        line = {"event": event, "t": time.time(), "pid": os.getpid(), **more}
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def write_request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        short = len(body) <= SHORT_BODY_BYTES
        self.write(
            "request",
            method=method,
            path=path,
            headers=headers,
            body_bytes=len(body),
            body_sha256=hashlib.sha256(body).hexdigest(),
            body=body.decode("utf-8", "replace") if short else None,
        )


def read_journal(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Return what has been written so far, of one kind if `event` names it; [] without a file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if not event or line["event"] == event]
