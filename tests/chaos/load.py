"""Mixed load that never stops: whole answers, streams, uploads, loads and unloads, monitoring.

Every request is kept with its verdict. Between two faults the load pauses, so that each request
belongs to one fault.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.client import Answer, ask, request
from tests.chaos.judge import OK, Verdict, judge
from tests.chaos.machine import CANARY, HOME, OTHERS

CLIENTS = 5
#: seconds a client rests between two requests, at most
REST_S = 0.15
#: a load of the canary that takes longer than this is one that does not happen
CANARY_S = 30.0
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One request and what came of it. Times are monotonic seconds."""

    kind: str
    model: str
    began: float
    ended: float
    verdict: Verdict


def chat(model: str, *, stream: bool = False, tokens: int = 8, **fake: object) -> bytes:
    """Return a chat request. fake: knobs of the stand-in for this request."""
    messages = [{"role": "user", "content": "say something"}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}
    return request(CHAT, {**body, "fake": fake} if fake else body)


def operation(model: str, verb: str) -> bytes:
    """Return a load or an unload by API."""
    return request(f"/api/models/{model}/{verb}", {})


def upload(model: str, size: int) -> bytes:
    """Return a recording to be transcribed, as a form."""
    parts = (
        f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    body = parts.encode() + b"\0" * size + b"\r\n--b--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b\r\n"
    return request("/v1/audio/transcriptions", body, extra=kind)


def chunked(model: str, chooser: random.Random) -> bytes:
    """Return a chat request whose body comes in chunks of any size."""
    whole = chat(model)
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    pieces = []
    while body:
        size = chooser.randint(1, 60)
        pieces.append(b"%x\r\n%b\r\n" % (len(body[:size]), body[:size]))
        body = body[size:]
    framing = b"Transfer-Encoding: chunked\r\n\r\n"
    return b"\r\n".join(lines) + b"\r\n" + framing + b"".join(pieces) + b"0\r\n\r\n"


@dataclass(slots=True, kw_only=True)
class Health:
    """One look at /health. at: monotonic seconds."""

    at: float
    said: str


@dataclass(slots=True)
class Load:
    """The clients. `go` and `rest` are called by the driver alone."""

    port: int
    seed: int
    done: list[Done] = field(default_factory=list)
    healths: list[Health] = field(default_factory=list)
    #: what a load of the canary did while /health said all is well
    lies: list[str] = field(default_factory=list)
    _going: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _in_flight: int = 0
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        work: list[Callable[[random.Random], None]] = [self._anything] * CLIENTS
        for number, act in enumerate([*work, self._canary, self._monitor]):
            chooser = random.Random(f"{self.seed} {number}")
            thread = threading.Thread(target=self._client, args=(act, chooser), daemon=True)
            self._threads.append(thread)
            thread.start()

    def go(self) -> None:
        """Let the clients send requests."""
        with self._lock:
            self.done, self.healths, self.lies = [], [], []
        self._going.set()

    def rest(self, within_s: float) -> bool:
        """Let no client begin another request; returns whether all were answered in time."""
        self._going.clear()
        with self._lock:
            return self._lock.wait_for(lambda: self._in_flight == 0, within_s)

    def end(self) -> None:
        self._ended.set()
        self._going.set()

    def ask(self, kind: str, model: str, payload: bytes, *, expected: str = OK) -> Verdict:
        """Send a request, judge its answer and keep both. expected: the word that is right."""
        began = time.monotonic()
        verdict = judge(kind, ask(self.port, payload))
        if verdict.word == expected:
            verdict = Verdict(word=OK)
        self.keep(kind, model, began, verdict)
        return verdict

    def keep(self, kind: str, model: str, began: float, verdict: Verdict) -> None:
        ended = time.monotonic()
        with self._lock:
            self.done.append(
                Done(kind=kind, model=model, began=began, ended=ended, verdict=verdict)
            )

    def _client(self, act: Callable[[random.Random], None], chooser: random.Random) -> None:
        while not self._ended.is_set():
            self._going.wait()
            with self._lock:
                if not self._going.is_set():
                    continue
                self._in_flight += 1
            try:
                act(chooser)
            finally:
                with self._lock:
                    self._in_flight -= 1
                    self._lock.notify_all()
            self._ended.wait(chooser.uniform(0, REST_S))

    def _anything(self, chooser: random.Random) -> None:
        far = chooser.random() < 0.04
        model = chooser.choice(list(OTHERS if far else HOME))
        # a load starts a process, and costs as much as a hundred requests
        kinds = {"plain": 16, "stream": 12, "upload": 4, "chunked": 2, "load": 0.7, "unload": 0.5}
        kinds |= {"status": 1, "metrics": 1, "models": 1, "unknown": 1}
        kind = chooser.choices(list(kinds), list(kinds.values()))[0]
        if kind == "plain":
            self.ask(kind, model, chat(model, tokens=chooser.randint(1, 20)))
        elif kind == "stream":
            pace = chooser.choice((0, 0.002, 0.02))
            self.ask(kind, model, chat(model, stream=True, tokens=20, token_s=pace))
        elif kind == "upload":
            self.ask(kind, model, upload(model, chooser.choice((10, 70_000, 600_000))))
        elif kind == "chunked":
            self.ask("plain", model, chunked(model, chooser))
        elif kind in ("load", "unload"):
            self.ask("operation", model, operation(model, kind))
        elif kind == "status":
            self.ask("page", "", request("/status"))
        elif kind == "metrics":
            self.ask("figures", "", request("/metrics"))
        elif kind == "models":
            self.ask("operation", "", request("/v1/models"))
        else:
            self.ask(kind, "", chat("no-such-model"), expected="model_not_found")

    def _canary(self, chooser: random.Random) -> None:
        """Load the canary anew. If that fails, or takes long, /health must have said so."""
        self.ask("operation", CANARY, operation(CANARY, "unload"))
        began = time.monotonic()
        verdict = self.ask("plain", CANARY, chat(CANARY))
        took_s = time.monotonic() - began
        if took_s > CANARY_S:
            late = [look.said for look in self.healths if look.at > began + CANARY_S / 2]
            if late and all(said == "ok" for said in late):
                text = f"a load took {took_s:.0f} s ({verdict.word}), /health said ok all the time"
                self.lies.append(text)
        self._ended.wait(chooser.uniform(0, 2.0))

    def _monitor(self, _chooser: random.Random) -> None:
        """Poll /health as monitoring does."""
        began = time.monotonic()
        answer = ask(self.port, request("/health"))
        verdict = judge("page", answer)
        self.keep("health", "", began, verdict)
        said = _said(answer) if verdict.word == OK else verdict.word
        self.healths.append(Health(at=time.monotonic(), said=said))
        self._ended.wait(0.2)


def _said(answer: Answer) -> str:
    return str(answer.json()["status"])
