"""How long the manager's loop stands, as `serve` sees it: what says that it must be replaced."""

from __future__ import annotations

from smartproxy.signs import RESTING

#: one look counts for no more: after a pause of the whole machine, everybody gets time to go on
MOST_OF_A_LOOK_S = 1.0


class Stall:
    """Adds up the time in which a manager finished no pass. Main loop of `serve` only."""

    def __init__(self) -> None:
        self._seen: tuple[int, float | None] | None = None
        self._looked_at = 0.0
        self._stood_s = 0.0

    def look(self, pid: int, last_pass: float | None, now: float) -> float:
        """Return for how many seconds the loop of process `pid` stands.

        last_pass: as the manager told it; None: it has finished none. now: time.monotonic().
        """
        elapsed_s, self._looked_at = now - self._looked_at, now
        if self._seen != (pid, last_pass) or last_pass == RESTING:
            self._seen, self._stood_s = (pid, last_pass), 0.0
        else:
            self._stood_s += min(elapsed_s, MOST_OF_A_LOOK_S)
        return self._stood_s

    def begin_anew(self) -> None:
        """Count from now on: something was done about it."""
        self._stood_s = 0.0
