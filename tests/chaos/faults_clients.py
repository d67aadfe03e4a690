"""Clients: those that leave, are slow, send too much, or send what is no HTTP."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

from tests.chaos.client import Failure, connect, read_answer, request
from tests.chaos.fault import Faulty, Scene, fault
from tests.chaos.judge import OK, judge
from tests.chaos.load import CHAT, chat, chunked, operation
from tests.chaos.machine import CANARY, HOME

#: answers to what is no request, or none that may be
REFUSED = {400, 404, 405, 408, 411, 413, 414, 417, 431, 501, 505}


def _leaving(scene: Scene, send: Callable[[socket.socket], None], count: int) -> None:
    for _ in range(count):
        try:
            with connect(scene.port) as sock:
                send(sock)
        except OSError:
            continue


def _home(scene: Scene) -> str:
    return scene.chooser.choice(list(HOME))


@fault("clients leave before their request's head is whole")
def leave_in_head(scene: Scene) -> Faulty:
    whole = chat(_home(scene))
    _leaving(scene, lambda sock: sock.sendall(whole[: scene.chooser.randrange(1, 60)]), 30)
    yield


@fault("clients leave before their request's body is whole")
def leave_in_body(scene: Scene) -> Faulty:
    whole = chat(_home(scene))
    head = whole.index(b"\r\n\r\n") + 4
    _leaving(scene, lambda sock: sock.sendall(whole[: head + scene.chooser.randrange(40)]), 30)
    yield


@fault("clients leave at once", weight=2)
def leave_at_once(scene: Scene) -> Faulty:
    _leaving(scene, lambda sock: sock.sendall(chat(_home(scene))), 40)
    yield


@fault("clients leave in the moment their lease is written", weight=2)
def leave_with_lease(scene: Scene) -> Faulty:
    """F1: a server that was idle gets its lease with the first request."""

    def once(sock: socket.socket) -> None:
        sock.sendall(chat(CANARY))
        time.sleep(scene.chooser.uniform(0, 0.006))

    for _ in range(15):
        _leaving(scene, once, 2)
        time.sleep(0.08)  # longer than a lease lingers
    yield


@fault("clients leave while their model loads")
def leave_in_load(scene: Scene) -> Faulty:
    scene.judged("operation", "slow-load", operation("slow-load", "unload"))

    def once(sock: socket.socket) -> None:
        sock.sendall(chat("slow-load", stream=bool(scene.chooser.getrandbits(1))))
        time.sleep(scene.chooser.uniform(0, 0.3))

    _leaving(scene, once, 8)
    yield


@fault("callers of a load by API leave")
def leave_load_by_api(scene: Scene) -> Faulty:
    scene.judged("operation", "slow-load", operation("slow-load", "unload"))

    def once(sock: socket.socket) -> None:
        sock.sendall(operation("slow-load", "load"))
        time.sleep(scene.chooser.uniform(0, 0.2))

    _leaving(scene, once, 8)
    yield


@fault("clients leave after the first token", weight=2)
def leave_in_stream(scene: Scene) -> Faulty:
    model = _home(scene)

    def once(sock: socket.socket) -> None:
        sock.sendall(chat(model, stream=True, tokens=200, token_s=0.02))
        sock.settimeout(10)
        while b"data:" not in sock.recv(1 << 16):
            pass

    _leaving(scene, once, 8)
    yield


@fault("clients reset their connections")
def reset(scene: Scene) -> Faulty:
    model = _home(scene)

    def once(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(chat(model, stream=True, tokens=100, token_s=0.01))
        time.sleep(scene.chooser.uniform(0, 0.2))

    _leaving(scene, once, 20)
    yield


@fault("a client closes its half after the request")
def half_close(scene: Scene) -> Faulty:
    """F21: as `nc -N` does; it is there, and reads."""
    model = _home(scene)
    scene.warm(model)
    for stream in (False, True):
        with connect(scene.port) as sock:
            sock.sendall(chat(model, stream=stream))
            sock.shutdown(socket.SHUT_WR)
            verdict = judge("stream" if stream else "plain", read_answer(sock))
        scene.expect(verdict.word == OK, f"half-closed: {verdict.word} {verdict.detail}")
    yield


@fault("a client sends one byte at a time")
def byte_by_byte(scene: Scene) -> Faulty:
    model = _home(scene)
    for payload in (chat(model), chunked(model, scene.chooser)):
        with connect(scene.port) as sock:
            for byte in payload:
                sock.sendall(bytes([byte]))
                time.sleep(0.0005)
            verdict = judge("plain", read_answer(sock))
        scene.expect(verdict.word == OK, f"byte by byte: {verdict.word} {verdict.detail}")
    yield


def _paused(scene: Scene, count: int, head: bytes, work: Callable[[], None]) -> None:
    """Hold so many connections with half a request while something else is done."""
    socks = []
    try:
        for _ in range(count):
            sock = connect(scene.port)
            sock.sendall(head)
            socks.append(sock)
        work()
    finally:
        for sock in socks:
            sock.close()


def _all_served(scene: Scene) -> None:
    began = time.monotonic()
    for kind, payload in (
        ("plain", chat(_home(scene))),
        ("page", request("/health")),
        ("page", request("/status")),
        ("operation", operation(CANARY, "load")),
        ("operation", request("/v1/models")),
        ("plain", chunked(_home(scene), scene.chooser)),
    ):
        scene.judged(kind, "", payload, "ok")
    took_s = time.monotonic() - began
    scene.expect(took_s < 60, f"six requests beside slow clients took {took_s:.0f} s")


@fault("150 clients pause in the middle of a body")
def paused_bodies(scene: Scene) -> Faulty:
    """F8: bodies in chunks, and with Expect, that stop after a byte."""
    line = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
    heads = {
        "length": line + b"Content-Length: 5000\r\n\r\n{",
        "chunks": line + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        "expect": line + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n{",
    }
    for head in heads.values():
        _paused(scene, 150, head, lambda: _all_served(scene))
    yield


@fault("400 clients pause in the middle of a head")
def paused_heads(scene: Scene) -> Faulty:
    _paused(scene, 400, b"POST /v1/chat/completions HTTP/1.1\r\nHost:", lambda: _all_served(scene))
    yield


@fault("800 connections are opened and idle")
def idle(scene: Scene) -> Faulty:
    _paused(scene, 800, b"", lambda: _all_served(scene))
    yield


@fault(
    "150 loads by API of what can't be loaded",
    "queue_full",
    "pool_busy",
    "gpu_memory_busy",
)
def load_storm(scene: Scene) -> Faulty:
    """F8: each held a thread for as long as it waited."""
    scene.judged("operation", "slow-load", operation("slow-load", "unload"))
    payload = operation("slow-load", "load")
    _paused(scene, 150, payload, lambda: _all_served(scene))
    yield


@fault("a body says that it is far too large", hold_s=(0, 0.1))
def says_too_large(scene: Scene) -> Faulty:
    for size in (9 << 20, 1 << 40):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n".encode()
        answer = scene.raw(head + b"{")
        scene.expect(answer.status == 413, f"{size} bytes: {answer.status} {answer.failure}")
    yield


@fault("bodies are far too large", hold_s=(0, 0.1))
def too_large(scene: Scene) -> Faulty:
    def one() -> None:
        answer = scene.raw(chat("x" * (12 << 20)))
        right = answer.status == 413 or answer.failure in (Failure.RESET, Failure.TORN)
        scene.expect(right, f"12 MB: {answer.status} {answer.failure}")

    for _ in range(6):
        scene.beside(one)
    yield


@fault("a body in chunks has no end", hold_s=(0, 0.1))
def endless_chunks(scene: Scene) -> Faulty:
    line = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connect(scene.port) as sock:
        sock.sendall(line)
        sent = 0
        try:
            while not select.select([sock], [], [], 0)[0] and sent < 256 << 20:
                sock.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        answer = read_answer(sock)
    wrong = f"after {sent >> 20} MB of 8: {answer.status} {answer.failure}"
    scene.expect(answer.status == 413 and not answer.failure, wrong)
    yield


@fault("JSON is deep, long or broken")
def bad_json(scene: Scene) -> Faulty:
    bodies = {
        "deep": b'{"model":"home-1","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "many": b'{"model":"home-1","x":[' + b"{}," * 400_000 + b"{}]}",
        "broken": b'{"model": "home-1", "mess',
        "list": b"[1, 2]",
        "number": b"1e99999",
        "no utf-8": b'{"model": "\xff\xfe"}',
        "empty": b"",
        "twice": b'{"model": "home-1", "model": "no-such-model", "messages": []}',
        "no text": b'{"model": 17, "messages": []}',
        "null": b'{"model": null}',
    }
    for name, body in bodies.items():
        answer = scene.raw(request(CHAT, body))
        fine = answer.failure is None and (200 <= answer.status < 500 or not answer.code)
        scene.expect(fine, f"{name}: {answer.status} {answer.failure} {answer.body[:120]!r}")
    yield


def _malformed() -> dict[str, bytes]:
    line = f"POST {CHAT} HTTP/1.1\r\n".encode()
    host = b"Host: 127.0.0.1\r\n"
    return {
        "no host": line + b"Content-Length: 0\r\n\r\n",
        "two hosts": line + host + host + b"Content-Length: 0\r\n\r\n",
        "two lengths": line + host + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "length and chunks": line
        + host
        + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "bad length": line + host + b"Content-Length: +1\r\n\r\na",
        "bad chunk": line + host + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        "long cookie": line + host + b"Cookie: " + b"a" * 17_000 + b"\r\n\r\n",
        "many headers": line + host + b"".join(b"X-%d: 1\r\n" % n for n in range(150)) + b"\r\n",
        "long target": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
        "bad version": b"GET / HTTP/9.9\r\n" + host + b"\r\n",
        "no request": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
        "space in name": line + host + b"X Y: 1\r\n\r\n",
        "control": line + host + b"X: a\x00b\r\n\r\n",
        "bare lf": b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n",
        "unknown coding": line + host + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "obs-fold": line + host + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    }


@fault("requests are malformed", hold_s=(0, 0.1))
def malformed(scene: Scene) -> Faulty:
    """F15, F16, F21: each gets an answer that says so."""
    for name, payload in _malformed().items():
        answer = scene.raw(payload, deadline_s=10)
        fine = answer.failure is None and answer.status in (*REFUSED, 200)
        scene.expect(fine, f"{name}: {answer.status} {answer.failure} {answer.detail}")
    yield


@fault("a form has thousands of parts")
def form_bomb(scene: Scene) -> Faulty:
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
    body = part * 60_000 + b"--b--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b\r\n"
    began = time.monotonic()
    answer = scene.raw(request("/v1/audio/transcriptions", body, extra=kind), deadline_s=40)
    took_s = time.monotonic() - began
    fine = answer.status in (400, 404, 413) and took_s < 15
    scene.expect(fine, f"{answer.status} {answer.failure} after {took_s:.0f} s")
    yield


@fault("several requests come at once on one connection")
def pipelined(scene: Scene) -> Faulty:
    model = _home(scene)
    scene.warm(model)
    with connect(scene.port) as sock:
        sock.sendall(b"".join([chat(model), request("/health"), chat(model)]))
        data, end = b"", time.monotonic() + 20
        sock.settimeout(2)
        while data.count(b"HTTP/1.1 200") < 3 and time.monotonic() < end:
            try:
                piece = sock.recv(1 << 16)
            except TimeoutError:
                continue
            if not piece:
                break
            data += piece
    answers = data.count(b"HTTP/1.1 200")
    closed = b"connection: close" in data.lower()
    scene.expect(answers == 3 or closed, f"{answers} of 3 answers: {data[-200:]!r}")
    yield


@fault("one connection carries many requests")
def kept_alive(scene: Scene) -> Faulty:
    model = _home(scene)
    scene.warm(model)
    with connect(scene.port) as sock:
        for number in range(20):
            sock.sendall(chat(model, stream=bool(number % 2)))
            answer = read_answer(sock)
            verdict = judge("stream" if number % 2 else "plain", answer)
            if verdict.word != OK or answer.header("connection") == "close":
                break
    scene.expect(verdict.word == OK, f"request {number}: {verdict.word} {verdict.detail}")
    yield


@fault("100 clients ask for one model that is not loaded")
def crowd(scene: Scene) -> Faulty:
    scene.judged("operation", CANARY, operation(CANARY, "unload"))
    for number in range(100):
        stream = bool(number % 2)
        kind, payload = ("stream" if stream else "plain"), chat(CANARY, stream=stream)
        scene.beside(partial(scene.judged, kind, CANARY, payload, "ok"))
    yield


@fault("loads and unloads of one model rain")
def rain(scene: Scene) -> Faulty:
    for number in range(24):
        verb = "load" if number % 2 else "unload"
        scene.beside(partial(scene.judged, "operation", "lags", operation("lags", verb)))
    for _ in range(6):
        scene.beside(lambda: scene.judged("plain", "lags", chat("lags"), "ok"))
    yield


@fault("a whole answer is asked for by HTTP/1.0")
def old_http(scene: Scene) -> Faulty:
    payload = chat(_home(scene)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    answer = scene.raw(payload)
    verdict = judge("plain", answer)
    scene.expect(verdict.word == OK, f"HTTP/1.0: {verdict.word} {verdict.detail}")
    yield
