"""The socket that `smartproxy serve` listens on: an address and a port, or a path for an nginx."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from smartproxy.errors import ConfigError

BACKLOG = 2048
#: what a host starts with that is a path
UNIX = "unix:"


def listen(host: str, port: int, *, patience_s: float = 0.0) -> tuple[socket.socket, str]:
    """Return a listening socket that children inherit, and its name for people.

    host: an address, or `unix:/path` (port is not looked at then). patience_s: for who has it now
    to go. Raises ConfigError.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _listen(host, port)
        except InUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class InUse(ConfigError):
    """Another process listens there."""


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    if host.startswith(UNIX):
        listener, name = _listen_at(Path(host.removeprefix(UNIX))), host
    else:
        listener, name = _listen_on(host, port), f"http://{host}:{port}"
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener, name


def close(listener: socket.socket) -> None:
    """Close a listening socket, and remove its path if it has one."""
    path = listener.getsockname() if listener.family == socket.AF_UNIX else None
    listener.close()
    if path:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _listen_on(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"can't listen on {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        kind_of_error = InUse if error.errno == errno.EADDRINUSE else ConfigError
        raise kind_of_error(
            f"can't listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from None
    return listener


def _listen_at(path: Path) -> socket.socket:
    """Return a socket bound to a path, for its owner and group alone: who connects passes for nginx
    (proxy/relay/nginx.py)."""
    if not path.is_absolute():
        raise ConfigError(f"can't listen on {UNIX}{path}: the path must be absolute")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"can't listen on {UNIX}{path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    """Remove what a killed proxy left; what is in use, or no socket, stays."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"can't listen on {UNIX}{path}: it is there and is no socket")
    except OSError:
        return  # not there; binding says what else is wrong
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return
        else:
            raise InUse(f"can't listen on {UNIX}{path}: another process does")
