"""A real headless Chromium that shows pages of ours under any name, and the pages' own reports."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import system_packages
from tests.support.running import wait_until

#: a browser's start on a crowded machine, and its page's work
PATIENCE_S = 90.0
#: every name below this is this machine, as if an attacker's DNS said so
NAMES = "MAP *.example 127.0.0.1"
#: for a page's script: what an attempt gives a page to read, and how the page reports
HELPERS = """
const got = async (url, options) => {
  try {
    const answer = await fetch(url, options);
    if (answer.type === 'opaque') return 'sent, unreadable';
    return [answer.status, (await answer.text()).slice(0, 300)];
  } catch (error) { return 'refused'; }
};
const shown = url => new Promise(done => {
  const picture = new Image();
  picture.onload = () => done('shown');
  picture.onerror = () => done('refused');
  picture.src = url;
});
const report = result => fetch('/report', {method: 'POST', body: JSON.stringify(result)});
"""


class Site:
    """A web site of one page, which does what `script` says and reports what came of it."""

    def __init__(self) -> None:
        self.script = ""
        self.reports: queue.Queue[Any] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                run = f"<script>{HELPERS}(async () => {{ {site.script} }})()</script>"
                self._answer(f"<!doctype html><body>{run}" if self.path == "/" else "")

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                site.reports.put(json.loads(self.rfile.read(length)))
                self._answer("")

            def _answer(self, text: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Browser:
    """A running Chromium."""

    def __init__(self, debugger: str, site: Site) -> None:
        self._debugger = debugger
        self._site = site

    def report_of(self, name: str, script: str) -> Any:
        """Return what the site's page reports that is shown under a name."""
        self._site.script = script
        page = f"http://{name}:{self._site.port}/"
        requests.put(f"{self._debugger}/json/new?{page}", timeout=PATIENCE_S).raise_for_status()
        return self._site.reports.get(timeout=PATIENCE_S)


@contextmanager
def browser(folder: Path, site: Site) -> Iterator[Browser]:
    """Run Chromium for the length of a block."""
    command = argv("about:blank", folder, "--remote-debugging-port=0")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = folder / "chromium" / "DevToolsActivePort"
    try:
        wait_until(lambda: told.exists() and told.read_text(), within_s=PATIENCE_S, what="Chromium")
        yield Browser(f"http://127.0.0.1:{told.read_text().split()[0]}", site)
    finally:
        process.terminate()
        process.wait(60)


def document_at(url: str, folder: Path) -> str:
    """Return the document that a Chromium of its own makes of an address."""
    done = subprocess.run(
        argv(url, folder, "--dump-dom"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE_S,
        text=True,
        check=True,
    )
    return done.stdout


def argv(url: str, folder: Path, *options: str) -> list[str]:
    """Return the command line. Skips the test where there is no Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip(system_packages.reason("chromium"))
    return [
        *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-extensions", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder / 'chromium'}", f"--host-resolver-rules={NAMES}"),
        *(*options, url),
    ]
