"""Which of the processes below a `smartproxy serve` is what."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import psutil


@dataclass(slots=True, kw_only=True)
class Tree:
    """The proxy's own processes as pids; no llama-servers. Empty where one does not run."""

    serve: list[int] = field(default_factory=list)
    guard: list[int] = field(default_factory=list)
    manager: list[int] = field(default_factory=list)
    gunicorn: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)

    def items(self) -> list[tuple[str, int]]:
        """Return role and pid of every process."""
        roles = ("serve", "guard", "manager", "gunicorn", "worker")
        return [(role, pid) for role in roles for pid in getattr(self, role)]


def tree_of(serve_pid: int) -> Tree:
    """Return the processes of the proxy with this parent; all empty once the parent is gone."""
    tree = Tree()
    with contextlib.suppress(psutil.Error):
        serve = psutil.Process(serve_pid)
        if serve.status() == psutil.STATUS_ZOMBIE:
            return tree
        tree.serve.append(serve_pid)
        for process in serve.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                role = _role(process, serve_pid)
                if role and process.status() != psutil.STATUS_ZOMBIE:
                    getattr(tree, role).append(process.pid)
    return tree


def _role(process: psutil.Process, serve_pid: int) -> str | None:
    words, parent = " ".join(process.cmdline()), process.ppid()
    if "smartproxy.serving.guard" in words:
        return "guard"
    if "smartproxy.manager" in words and parent == serve_pid:
        return "manager"
    if "smartproxy.proxy.gunicorn_conf" in words:
        return "gunicorn" if parent == serve_pid else "worker"
    return None
