"""How many examples hypothesis tries: `make test` all of them, `make test-fast` a tenth."""

from __future__ import annotations

from hypothesis import settings

#: of hypothesis' own default profile
FULL = 100


def examples(full: int) -> int:
    """Return what the chosen profile leaves of so many examples."""
    return max(5, full * settings().max_examples // FULL)
