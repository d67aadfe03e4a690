"""Something that does not work for a while: say so once, and once when it works again."""

from __future__ import annotations

import logging


class Outage:
    """One thing's outage, for the log. Has one user, who tells it how every try went.

    what: a sentence for the log, "the state file can't be read". over: the one for its end.
    after_s: seconds of failing before it is told. At a start, workers are ready before the manager
    has made the state file; that is no news.
    """

    def __init__(self, logger: logging.Logger, *, what: str, over: str, after_s: float) -> None:
        self._logger = logger
        self._what, self._over, self._after_s = what, over, after_s
        #: time.monotonic() of the first failure in a row; None: the last try went well
        self._since: float | None = None
        self._told = False

    def failed(self, error: Exception, now: float) -> None:
        """Take note of a try that failed. now: time.monotonic()."""
        if self._since is None:
            self._since = now
        lasted_s = now - self._since
        if not self._told and lasted_s >= self._after_s:
            self._told = True
            self._logger.warning("%s, for %.0f s now: %s", self._what, lasted_s, error)

    def worked(self, now: float) -> None:
        """Take note of a try that went well."""
        if self._told and self._since is not None:
            self._logger.warning("%s, after %.0f s", self._over, now - self._since)
        self._since, self._told = None, False
