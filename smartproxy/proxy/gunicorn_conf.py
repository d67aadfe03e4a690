"""gunicorn's settings: `gunicorn -c python:smartproxy.proxy.gunicorn_conf wsgi:app`.

The command line wins over each of them (--bind, --workers, --threads, --access-logfile ...).
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from smartproxy.config.load import load_settings
from smartproxy.errors import ConfigError
from smartproxy.lifetime import die_with_parent

# What the application needs is loaded here already, so that the workers share its memory. The
# application itself is made after the fork: it holds sockets and threads.
from smartproxy.proxy import app as _application  # noqa: F401
from smartproxy.signs import LEAVING, UP, tell

#: as the manager's for a bad configuration
EXIT_CONFIG = 2


def _address() -> list[str]:
    """Return the configuration's address; a bad configuration is one line here too."""
    try:
        settings = load_settings()
        if not _bound_elsewhere() and (problem := settings.host_problem(settings.host)):
            raise ConfigError(f"{settings.config_path}: host: {problem}")
    except ConfigError as error:
        print(f"gunicorn: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    if settings.host.startswith("unix:"):
        return [settings.host]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return [f"{host}:{settings.port}"]


def _bound_elsewhere() -> bool:
    """Return whether the command line says where to listen: `serve` does, and has checked it."""
    return any(argument.split("=")[0] in ("-b", "--bind") for argument in sys.argv)


worker_class = "smartproxy.proxy.worker.worker.RelayWorker"
# A worker relays in one thread; two keep /health quick while one is busy, more than cores gain
# nothing.
workers = min(max(os.cpu_count() or 1, 2), 4)
# Threads only parse and decide (well under a millisecond each); streams and waiting requests hold
# none. But a load by API holds one until it is done, and /health must not queue behind those.
threads = 64
bind = _address()
backlog = 2048


def _raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it (workers inherit it)."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = hard if hard != resource.RLIM_INFINITY else 1 << 20
    limit = min(limit, 1 << 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


# An open stream takes two files (client and server side). Past this nothing is accepted, which is
# better than running out of files in the middle: gunicorn's worker dies of a failed accept.
worker_connections = min(max((_raise_file_limit() - 256) // 2, 128), 16384)

keepalive = 75
graceful_timeout = 30
timeout = 60
# Heartbeats are file times: in memory, so that a slow disk kills no worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# It would be a socket in the user's home, outside of everything we own.
control_socket_disable = True
errorlog = "-"
logger_class = "smartproxy.proxy.gunicorn_log.LineLogger"
# A header field may carry a long token or trace state; the total stays bounded by gunicorn.
limit_request_field_size = 16384
limit_request_line = 8190


def on_starting(server: Any) -> None:
    """Have gunicorn's master end with `serve`, however that ends; workers watch the master."""
    die_with_parent()
    # A socket that was given to us (by `serve`) is not ours to unlink: our successor gets it too.
    server.systemd = any(isinstance(address, int) for address in server.cfg.address)
    # `serve` starts the next one while we still finish what was begun (gunicorn has no hook here)
    server.handle_term = partial(_leave, server.handle_term)


def _leave(handle_term: Callable[[], None]) -> None:
    tell(LEAVING)
    handle_term()


def post_worker_init(_worker: object) -> None:
    """Say that a worker accepts connections from now on."""
    tell(UP)


def when_ready(_server: object) -> None:
    """Keep the collector off what was loaded before the fork: touching a page makes it a copy."""
    gc.collect()
    gc.freeze()
