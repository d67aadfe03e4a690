"""How logs look: one line an event, to stderr."""

from __future__ import annotations

import logging
import re
import sys
from datetime import datetime

#: whatever would break a line, or let a client's text look like a line of ours
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_INDENT = "    "


class LineFormatter(logging.Formatter):
    """time level logger message; a traceback follows, indented, from ERROR on."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).astimezone().isoformat("T", "milliseconds")
        message = _folded(record.getMessage())
        line = f"{when} {record.levelname} {record.name} {message}"
        if not record.exc_info or record.exc_info[1] is None:
            return line
        if record.levelno < logging.ERROR:
            error = record.exc_info[1]
            return f"{line} ({type(error).__name__}: {_folded(str(error))})"
        trace = self.formatException(record.exc_info)
        return "\n".join([line, *(_INDENT + _folded(part) for part in trace.splitlines())])


def setup_logging(level: str | int = logging.INFO) -> None:
    """Send everything from this level on to stderr; other packages from WARNING on.

    level: a number, or a name such as "info". Replaces what was set up before. Raises ValueError
    for an unknown name.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = level.upper() if isinstance(level, str) else level
    root.setLevel(logging.WARNING)
    logging.getLogger("smartproxy").setLevel(level)
    if logging.getLogger("smartproxy").level > logging.WARNING:
        root.setLevel(level)


def _folded(text: str) -> str:
    return _BREAKS.sub(" ", text).strip()
