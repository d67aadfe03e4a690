"""Faults whose mend is still on its way: by name, the number in issue #10's list of faults.

They are left out until the mend is there; `--all` injects them too.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {}
