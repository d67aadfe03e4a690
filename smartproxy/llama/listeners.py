"""Whose socket listens on a port, read from /proc.

Anybody on the machine may bind a server's port before the server does, and answer 200 to whoever
asks. So nobody gets a server's key or a prompt before it is known to be a process of ours.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

#: Linux's number of the state, in hexadecimal: include/net/tcp_states.h
_LISTEN = "0A"
#: local addresses that a connection to 127.0.0.1 may reach, as /proc writes them: the address
#: itself and any, of IPv4 and of IPv6
_REACHED = {
    "0100007F",
    "00000000",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000000000000",
}


def listens(pid: int, port: int) -> bool:
    """Return whether all that listens on a port of the loopback are a process and its children.

    False where nobody listens. Blocks for a millisecond or two.
    """
    others = _listening(port)
    if not others:
        return False
    others -= _sockets(pid)
    if others:  # a wrapper around llama-server
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return False
        for child in children:
            others -= _sockets(child.pid)
    return not others


def _listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen there."""
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", table).read_text().splitlines()[1:]
        except OSError:
            continue  # a machine without IPv6
        for line in lines:
            fields = line.split()
            address, _, number = fields[1].rpartition(":")
            if fields[3] == _LISTEN and int(number, 16) == port and address in _REACHED:
                found.add(fields[9])
    return found


def _sockets(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process has open; none where it can't be told."""
    found: set[str] = set()
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found
