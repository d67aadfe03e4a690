"""Who may ask: API keys of clients, and those for operations."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable

from flask import Request

from smartproxy.config.settings import Settings
from smartproxy.errors import InvalidApiKey

#: what monitoring polls, and what describes the API, needs no key
PUBLIC_PATHS = frozenset({"/health", "/openapi.json"})


def check(request: Request, settings: Settings) -> None:
    """Raise InvalidApiKey unless the request may go on.

    With admin_keys, /api/ needs one of them. With api_keys, everything else needs one (an admin key
    is good everywhere).
    """
    check_key(request.path, request.headers.get, settings)


def check_key(path: str, header: Callable[[str, str], str], settings: Settings) -> None:
    """Raise InvalidApiKey unless who sends these headers may use the path.

    header: returns a header's value, or what it is told where there is none.
    """
    if path.startswith("/api/") and settings.admin_keys:
        wanted: Iterable[str] = settings.admin_keys
    elif settings.api_keys and path not in PUBLIC_PATHS:
        wanted = (*settings.api_keys, *settings.admin_keys)
    else:
        return
    given = presented_key(header)
    if given is None:
        raise InvalidApiKey("no API key: send `Authorization: Bearer KEY`")
    # every key is compared in constant time, so that answers tell nothing about them
    if not any([hmac.compare_digest(given.encode(), key.encode()) for key in wanted]):
        raise InvalidApiKey("this API key is not valid here")


def presented_key(header: Callable[[str, str], str]) -> str | None:
    """Return the key of a request: Authorization: Bearer, or X-Api-Key as Anthropic clients do.

    header: returns a header's value, or what it is told where there is none.
    """
    scheme, _, key = header("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return header("X-Api-Key", "") or None
