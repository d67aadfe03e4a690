"""Who may ask: API keys of clients, and those for operations.

A key is compared with every known one in constant time, as text: nothing of a request ever becomes
part of a query, a path or a command line here.
"""

from __future__ import annotations

import hmac
import posixpath
from collections.abc import Callable, Iterable
from enum import IntEnum

from flask import Request

from smartproxy.catalog.catalog import Catalog
from smartproxy.config.keys import KeySettings
from smartproxy.config.settings import Settings
from smartproxy.errors import InvalidApiKey, ModelNotAllowed

#: what monitoring polls, and what describes the API, needs no key
PUBLIC_PATHS = frozenset({"/health", "/openapi.json"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})

Header = Callable[[str, str], str]


class Role(IntEnum):
    """Who asks; each may what those before it may."""

    #: has no key, or a wrong one, where clients need one
    STRANGER = 0
    CLIENT = 1
    #: operations, paths, processes. Where nobody has keys everybody is one, and where there are no
    #: admin_keys every client
    ADMIN = 2


def check(request: Request, settings: Settings) -> Role:
    """Return who asks. Raises InvalidApiKey unless the request may go on."""
    return check_key(request.path, request.headers.get, settings)


def check_key(path: str, header: Header, settings: Settings) -> Role:
    """Return who sends these headers. Raises InvalidApiKey unless they may use the path.

    /api/ is for operators, PUBLIC_PATHS are for everybody, all else is for clients. header: returns
    a header's value, or what it is told where there is none.
    """
    if not settings.api_keys and not settings.admin_keys:
        return Role.ADMIN
    if path.startswith("/api/"):
        return require(Role.ADMIN, header, settings)
    return require(Role.STRANGER if path in PUBLIC_PATHS else Role.CLIENT, header, settings)


def require(least: Role, header: Header, settings: Settings) -> Role:
    """Return who sends these headers. Raises InvalidApiKey where they may less than that."""
    given = presented_key(header)
    role = role_of(given, settings)
    if role >= least:
        return role
    if given is None:
        raise InvalidApiKey("no API key: send `Authorization: Bearer KEY`")
    if role is Role.CLIENT or _known(given, settings.api_keys):
        named = settings.named_keys.get(given)
        which = f'the API key "{named.name}"' if named else "this API key"
        raise InvalidApiKey(f"{which} is not valid here: it wants one of admin_keys")
    raise InvalidApiKey("this API key is not valid here")


def role_of(given: str | None, settings: Settings) -> Role:
    """Return who has this key; None: no key."""
    if not settings.api_keys and not settings.admin_keys:
        return Role.ADMIN
    is_admin, is_client = _known(given, settings.admin_keys), _known(given, settings.api_keys)
    if is_admin or (is_client and not settings.admin_keys):
        return Role.ADMIN
    return Role.CLIENT if is_client or not settings.api_keys else Role.STRANGER


def named_key(header: Header, settings: Settings) -> KeySettings | None:
    """Return the key of who was let in before, where it has a name and so may have limits."""
    if not settings.named_keys:
        return None
    return settings.named_keys.get(presented_key(header) or "")


def check_model(key: KeySettings | None, model_id: str, catalog: Catalog) -> None:
    """Raise ModelNotAllowed unless a key may use a model."""
    if key is None or key.models is None or may_use(key, model_id, catalog):
        return
    raise ModelNotAllowed(
        f'the API key "{key.name}" may not use the model "{model_id}"; it may use:'
        f" {', '.join(key.models)}"
    )


def may_use(key: KeySettings | None, model_id: str, catalog: Catalog) -> bool:
    """Return whether a key may use a model; None: who has no limits."""
    if key is None or key.models is None:
        return True
    return model_id in catalog.models_of_keys.get(key.name or "", ())


def _known(given: str | None, keys: Iterable[KeySettings]) -> bool:
    # every key is compared in constant time, so that answers tell nothing about them
    sent = (given or "").encode()
    return any([hmac.compare_digest(sent, key.key.encode()) for key in keys]) and bool(sent)


def changes_server(method: str, path: str, query: str) -> bool:
    """Return whether a request to a llama-server changes it for everybody, or acts beyond it.

    path: as the server sees it, percent signs decoded. Slots are saved, restored and erased, global
    properties and adapters set, tools run and requests of others' choice sent.
    """
    first, *_ = posixpath.normpath(path).lower().lstrip("/").partition("/")
    if first in ("tools", "cors-proxy"):
        return True
    if first == "slots":
        return method not in READING or "action" in query
    return first in ("props", "lora-adapters") and method not in READING


def presented_key(header: Header) -> str | None:
    """Return the key of a request: Authorization: Bearer, or X-Api-Key as Anthropic clients do.

    header: returns a header's value, or what it is told where there is none.
    """
    scheme, _, key = header("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return header("X-Api-Key", "") or None
