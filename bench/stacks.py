"""The ways to a server that `bench.datapath` compares, each started as its users start it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import requests

from bench.processes import Stack
from smartproxy.llama.binary import child_environment, find
from tests.support.nginxes import NGINX, nginx
from tests.support.ports import free_port
from tests.support.running import REAL_MODEL, Proxy, running
from tests.support.wire import Wire

MODEL = "fake"
START_DEADLINE_S = 180.0
PLAIN_NGINX = """
daemon off; {user} worker_processes auto; worker_rlimit_nofile 65536; pid {folder}/pid;
error_log {folder}/error.log; events {{ worker_connections 16384; }}
http {{
 access_log off; tcp_nodelay on; keepalive_requests 100000; {temporary}
 upstream backend {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 100000; }}
 server {{ listen 127.0.0.1:{port} backlog=4096; location / {{
  proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
  proxy_buffering off; proxy_read_timeout 600s; }} }}
}}
"""


class BehindNginx(Proxy):
    """A proxy that listens on a unix socket alone."""

    def health(self) -> dict[str, Any]:
        path = self.folder / "control.sock"
        if not path.exists():
            return {}
        with Wire(str(path)) as wire:
            wire.send(b"GET /health HTTP/1.1\r\nHost: p\r\n\r\n")
            return dict(wire.read_answer().json())


@contextlib.contextmanager
def started(argv: list[Any], folder: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a block, its output in a file."""
    with (folder / "out.log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, **more)
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for left in (process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def wait_answers(stack: Stack) -> Stack:
    """Wait until a stack answers a request for its model."""
    deadline = time.monotonic() + START_DEADLINE_S
    body = {"model": stack.model, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    said = ""
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            url = f"http://{stack.address}/v1/chat/completions"
            answer = requests.post(url, json=body, timeout=30)
            if answer.status_code == 200:
                return stack
            said = answer.text
        time.sleep(0.1)
    raise RuntimeError(f"{stack.name} does not answer: {said[:500]}")


@contextlib.contextmanager
def direct(upstream: list[Any], folder: Path) -> Iterator[Stack]:
    """A server without anything between."""
    folder.mkdir()
    port = free_port()
    with started([*upstream, "--port", str(port)], folder, env=environment()):
        yield wait_answers(Stack(name="direct", address=f"127.0.0.1:{port}", model=MODEL, pids=[]))


@contextlib.contextmanager
def nginx_alone(backend: str, folder: Path) -> Iterator[Stack]:
    """nginx as a plain proxy: it knows one server and no models."""
    folder.mkdir()
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    conf = PLAIN_NGINX.format(
        folder=folder,
        port=port,
        backend=backend.rpartition(":")[2],
        user="user root;" if os.geteuid() == 0 else "",
        temporary="".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds),
    )
    (folder / "nginx.conf").write_text(conf)
    argv = [NGINX, "-e", folder / "error.log", "-c", folder / "nginx.conf"]
    with started(argv, folder) as process:
        address = f"127.0.0.1:{port}"
        yield wait_answers(
            Stack(name="nginx alone", address=address, model=MODEL, pids=[process.pid])
        )


@contextlib.contextmanager
def router(server: Path | None, folder: Path) -> Iterator[Stack]:
    """llama.cpp's own router in front of a server of its own; None: the real one.

    It starts children from its own binary's path, which it looks up once: once it runs, another
    program is put there. Its log is off.
    """
    real, library_dir = find(None, os.environ.get("PATH"))
    home = folder / "bin"
    home.mkdir(parents=True)
    for part in (library_dir or real.parent).glob("*.so*"):
        (home / part.name).symlink_to(part)
    binary = home / "llama-server"
    shutil.copy2(real, binary)
    preset = folder / "preset.ini"
    preset.write_text(f"[{MODEL}]\nmodel = {REAL_MODEL}\n{REAL_SERVER_PRESET}")
    port = free_port()
    argv = [binary, "--log-disable", "--host", "127.0.0.1", "--port", str(port)]
    with started([*argv, "--models-preset", preset], folder, env=environment()) as process:
        url = f"http://127.0.0.1:{port}/models"
        wait_for(lambda: requests.get(url, timeout=5).ok)
        if server is not None:
            binary.unlink()
            shutil.copy2(server, binary)
        yield wait_answers(
            Stack(
                name="llama.cpp router",
                address=f"127.0.0.1:{port}",
                model=MODEL,
                pids=[process.pid],
                is_server=lambda found: found.pid != process.pid,
            )
        )


#: as our own commands say it, so that the real servers do the same work
REAL_SERVER_PRESET = "ctx-size = 8192\nparallel = 4\nthreads = 1\n"


@contextlib.contextmanager
def ours(server: Path | None, folder: Path, *, behind_nginx: bool = False) -> Iterator[Stack]:
    """This proxy, started with `smartproxy serve`; server None: the real one."""
    folder.mkdir()
    before = {child.pid for child in psutil.Process().children()}
    model = {"path": str(REAL_MODEL), "args": [] if server else ["--threads", "1"]}
    settings: dict[str, Any] = {"enable_gpu_monitoring": False}
    if server is not None:
        settings["llama_server"] = str(server)
    if behind_nginx:
        settings.update(host=f"unix:{folder}/control.sock", kind=BehindNginx)
    with contextlib.ExitStack() as running_parts:
        proxy = running_parts.enter_context(running(folder, {MODEL: model}, real=True, **settings))
        address = f"127.0.0.1:{proxy.port}"
        if behind_nginx:
            every_core = {"worker_processes 1;": "worker_processes auto;"}
            at = running_parts.enter_context(nginx(folder, f"{folder}/control.sock", every_core))
            address = f"{at[0]}:{at[1]}"
        pids = [child.pid for child in psutil.Process().children() if child.pid not in before]
        name = "ours behind nginx" if behind_nginx else "ours"
        yield wait_answers(
            Stack(name=name, address=address, model=MODEL, pids=pids, is_server=_is_our_server)
        )


def _is_our_server(process: psutil.Process) -> bool:
    return "--alias" in process.cmdline()


@contextlib.contextmanager
def litellm(venv: Path, backend: str, folder: Path) -> Iterator[Stack]:
    """LiteLLM's proxy in a virtual environment of its own, two workers, its log off."""
    folder.mkdir()
    program = venv / "bin" / "litellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "-q", "litellm[proxy]"], check=True)
    where = {"model": f"openai/{MODEL}", "api_base": f"http://{backend}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": where}],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        # else it wants a key of a strength that a bench does not need
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    port = free_port()
    argv = [program, "--config", folder / "config.json", "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--num_workers", "2"]
    env = {**environment(), "LITELLM_LOG": "ERROR", "PATH": f"{venv}/bin:{os.environ['PATH']}"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # it takes half a minute to start as it is
    with started(argv, folder, env=env, cwd=folder) as process:
        address = f"127.0.0.1:{port}"
        yield wait_answers(
            Stack(
                name="LiteLLM",
                address=address,
                model=MODEL,
                pids=[process.pid],
                share=0.03,
                rewrites=True,
            )
        )


def wait_for(condition: Any) -> None:
    """Wait until a condition holds; a refused connection is not yet."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if condition():
                return
        time.sleep(0.05)
    raise RuntimeError("not up in time")


def environment() -> dict[str, str]:
    """Return the environment of a server: with the libraries of the installed one."""
    real, library_dir = find(None, os.environ.get("PATH"))
    return child_environment(os.environ, library_dir or real.parent)
