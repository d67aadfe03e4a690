"""Which pages of the web may reach the proxy: the names it is called by, and the pages' origins.

A browser lets any page send requests to any address, also to one behind its user's firewall. It
says which page it was (Origin, Sec-Fetch-Site), and which name the page called (Host). A page can
forge neither. docs/security.md has the threats.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import lru_cache
from ipaddress import ip_address

from smartproxy.config.settings import Settings
from smartproxy.errors import HostNotAllowed, OriginNotAllowed

#: operations: never open to another origin, whatever is configured
API_PREFIX = "/api/"
#: so many different values of Host and of Origin are remembered
REMEMBERED = 256
ANY = "*"
#: a page of another origin can't send one of these without asking first (a CORS preflight)
UNSENDABLE = ("authorization", "x-api-key", "x-requested-with")
OTHER_SITES = frozenset({"cross-site", "same-site"})


class Browsers:
    """What the configuration says of browsers. Reads only; any thread."""

    def __init__(self, settings: Settings) -> None:
        self._names = frozenset(
            {"localhost", *own_names(), settings.host.lower(), *settings.allowed_hosts}
        )
        self._origins = frozenset(settings.allowed_origins)
        #: by the header's value: looked up once a request
        self.host_allowed = lru_cache(REMEMBERED)(self._host_allowed)
        self.origin_allowed = lru_cache(REMEMBERED)(self._origin_allowed)

    def check(
        self, method: str, path: str, header: Callable[[str, str], str], *, trust_host: bool
    ) -> None:
        """Raise HostNotAllowed or OriginNotAllowed where a page must not send this.

        header: returns a header's value, or what it is told where there is none. trust_host: who is
        in front of us, on a unix socket, has looked at the Host.
        """
        host = header("Host", "")
        if not trust_host and host and not self.host_allowed(host):
            raise HostNotAllowed(
                f"this proxy is not called {host[:200]!r}: use its IP address or localhost, or add"
                " the name to allowed_hosts"
            )
        if path.startswith(API_PREFIX):
            _check_operation(method, header, host)
        else:
            self._check_inference(method, header, host)

    def reader(self, origin: str, path: str) -> bytes:
        """Return what Access-Control-Allow-Origin says to a page of this origin; nothing: no."""
        if not origin or path.startswith(API_PREFIX) or not self.origin_allowed(origin):
            return b""
        return ANY.encode() if ANY in self._origins else origin.encode("latin-1")

    def _check_inference(self, method: str, header: Callable[[str, str], str], host: str) -> None:
        """Refuse what the page of an origin that is not allowed can send without a preflight.

        With a JSON content type its browser asks first, and is told no; so what comes with one is
        from a program that passes a page's Origin on.
        """
        origin = header("Origin", "")
        if origin:
            if is_own(origin, host) or self.origin_allowed(origin):
                return
            if method != "OPTIONS" and is_json(header):
                return
        elif ANY in self._origins or not _hidden_page(method, header, frozenset({"cross-site"})):
            return
        raise OriginNotAllowed(
            f"a page of {origin[:200] or 'another site'} must not send this: add its origin to"
            " allowed_origins"
        )

    def _host_allowed(self, host: str) -> bool:
        name = name_of(host)
        if ANY in self._names or name in self._names or is_address(name):
            return True
        return any(known.startswith("*.") and name.endswith(known[1:]) for known in self._names)

    def _origin_allowed(self, origin: str) -> bool:
        if ANY in self._origins or origin.lower() in self._origins:
            return True
        scheme, _, authority = origin.partition("://")
        name = name_of(authority)
        return scheme in ("http", "https") and (
            name == "localhost" or (is_address(name) and ip_address(name).is_loopback)
        )


def _check_operation(method: str, header: Callable[[str, str], str], host: str) -> None:
    """Refuse what a page of another origin can send to /api/, whatever it may read."""
    origin = header("Origin", "")
    if (origin and not is_own(origin, host)) or (
        not origin and _hidden_page(method, header, OTHER_SITES)
    ):
        raise OriginNotAllowed(
            f"{API_PREFIX} is open to the proxy's own pages only, and to programs; this came from a"
            f" page of {origin[:200] or 'another site'}"
        )
    if method in ("GET", "HEAD", "OPTIONS") or is_json(header):
        return
    if not any(header(name, "") for name in UNSENDABLE):
        raise OriginNotAllowed(
            f"{method} under {API_PREFIX} must have `Content-Type: application/json`,"
            " `X-Requested-With` or a key, which a page of another site can't send"
        )


def _hidden_page(method: str, header: Callable[[str, str], str], sites: frozenset[str]) -> bool:
    """Return whether a page of these sites sent a request without saying its origin.

    A picture, a frame, a form: what a browser loads for a page. A link that a person follows is
    none.
    """
    if header("Sec-Fetch-Site", "") not in sites:
        return False
    followed = header("Sec-Fetch-Mode", "") == "navigate" and header("Sec-Fetch-User", "") == "?1"
    return not (followed and method == "GET" and header("Sec-Fetch-Dest", "") == "document")


def is_json(header: Callable[[str, str], str]) -> bool:
    """Return whether the content type is JSON, for which a browser asks before it sends."""
    kind = header("Content-Type", "").partition(";")[0].strip().lower()
    return kind == "application/json"


def is_own(origin: str, host: str) -> bool:
    """Return whether a page's origin is the very address that it called."""
    scheme, _, authority = origin.lower().partition("://")
    return scheme in ("http", "https") and bool(authority) and authority == host.lower()


def name_of(host: str) -> str:
    """Return a Host's name or address, in lower case: without port, brackets and final dot."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def is_address(name: str) -> bool:
    """Return whether this is an IP address, which nobody's DNS can point elsewhere."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def own_names() -> set[str]:
    """Return the names of this machine, as others in its network call it."""
    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    return {name for name in (full, short, f"{short}.local") if short}
