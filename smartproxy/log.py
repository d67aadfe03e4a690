"""How logs look: one line an event, to stderr; and what lasts is told once (`Outage`)."""

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


class Outage:
    """What does not work for a while, for the log: told once at its start and once at its end.

    It has one user, who tells it how every try went.

    what: a sentence for the log, "the state file can't be read". over: the one for its end.
    after_s: seconds of failing before it is told. At a start, workers are ready before the manager
    has made the state file; that is no news. calm_s: seconds without a failure before it counts as
    over, for what now works and now does not.
    """

    def __init__(
        self, logger: logging.Logger, *, what: str, over: str, after_s: float, calm_s: float = 0.0
    ) -> None:
        self._logger = logger
        self._what, self._over, self._after_s, self._calm_s = what, over, after_s, calm_s
        #: time.monotonic() of the first failure in a row and of the last; None: it works
        self._since: float | None = None
        self._failed_at = 0.0
        self._told = False

    def failed(self, error: Exception, now: float) -> None:
        """Take note of a try that failed. now: time.monotonic()."""
        self._failed_at = now
        if self._since is None:
            self._since = now
        lasted_s = now - self._since
        if not self._told and lasted_s >= self._after_s:
            self._told = True
            self._logger.warning("%s, for %.0f s now: %s", self._what, lasted_s, error)

    def worked(self, now: float) -> None:
        """Take note of a try that went well."""
        if self._since is None or now - self._failed_at < self._calm_s:
            return
        if self._told:
            self._logger.warning("%s, after %.0f s", self._over, now - self._since)
        self._since, self._told = None, False
