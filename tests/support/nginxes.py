"""The real nginx with the shipped deploy/nginx.conf, unprivileged, in a folder of a test."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import system_packages
from tests.support.gunicorns import ROOT
from tests.support.ports import free_port
from tests.support.upstreams import wait_until

NGINX = shutil.which("nginx", path=system_packages.PATH_OF_ROOT)


def shipped_conf(folder: Path, control_socket: str, port: int) -> str:
    """Return deploy/nginx.conf with only places changed: files, socket, port, range of ports."""
    text = (ROOT / "deploy/nginx.conf").read_text()
    places = {
        "/var/log/nginx/error.log": f"{folder}/error.log",
        "/var/log/nginx/access.log": f"{folder}/access.log",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "server unix:/run/smartproxy/control.sock": f"server unix:{control_socket}",
        "listen 80;": f"listen 127.0.0.1:{port};",
        "80[89][0-9]$": "[1-9][0-9]{4}$",
        "worker_processes auto;": "worker_processes 1;",
    }
    for shipped, here in places.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return re.sub(r"^http \{$", "http {\n" + temporary, text, flags=re.M)


@contextmanager
def nginx(
    folder: Path, control_socket: str, changes: dict[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """Start nginx; gives its address. changes: of the configuration's text, old to new."""
    if NGINX is None:
        pytest.skip(system_packages.reason("nginx"))
    port = free_port()
    text = shipped_conf(folder, control_socket, port)
    for old, new in (changes or {}).items():
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    conf = folder / "nginx.conf"
    # started by root, its workers would be `nobody`, who can't reach a test's folder
    user = "user root;\n" if os.geteuid() == 0 else ""
    conf.write_text("daemon off;\n" + user + text)
    argv = [NGINX, "-e", str(folder / "error.log"), "-c", str(conf)]
    with (folder / "nginx.out").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        wait_until(lambda: process.poll() is not None or _listens(port), "nginx up")
        assert process.poll() is None, (folder / "nginx.out").read_text()
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(60)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
