"""llama-servers: killed in every state, stopped, and with manners of every bad kind."""

from __future__ import annotations

import signal
import socket
import time
from typing import Any

from tests.chaos.client import Failure, read_answer
from tests.chaos.fault import SERVER_DIED, Faulty, Scene, fault
from tests.chaos.judge import judge
from tests.chaos.load import chat, operation
from tests.chaos.machine import HOME, becomes, send

LOAD_FAILED = frozenset({"model_load_failed"})


def _ready(scene: Scene) -> dict[str, Any]:
    """Return a ready server that the load uses."""
    model = scene.chooser.choice(list(HOME))
    scene.warm(model)
    rows = scene.machine.servers("ready") or [{}]
    return next((row for row in rows if row.get("model_id") == model), rows[0])


def _kill(scene: Scene, row: dict[str, Any], number: signal.Signals) -> None:
    if row.get("pid"):
        send(row["pid"], number)


@fault("a ready server is killed", SERVER_DIED, weight=4)
def kill_ready(scene: Scene) -> Faulty:
    _kill(scene, _ready(scene), signal.SIGKILL)
    yield


@fault("a ready server ends with a segmentation fault", SERVER_DIED)
def segv_ready(scene: Scene) -> Faulty:
    _kill(scene, _ready(scene), signal.SIGSEGV)
    yield


@fault("a ready server is told to end by somebody else", SERVER_DIED, "upstream_timeout")
def term_ready(scene: Scene) -> Faulty:
    """With a stream in it, llama-server stays for 30 s and says nothing."""
    _kill(scene, _ready(scene), signal.SIGTERM)
    yield


@fault("a busy server is killed", SERVER_DIED, weight=2)
def kill_busy(scene: Scene) -> Faulty:
    row = _ready(scene)
    model = row.get("model_id", "home-1")
    slow = chat(model, stream=True, tokens=100, token_s=0.02)
    scene.beside(lambda: scene.judged("stream", model, slow))
    time.sleep(0.3)
    _kill(scene, row, signal.SIGKILL)
    yield


@fault("all servers are killed", SERVER_DIED, weight=2)
def kill_all(scene: Scene) -> Faulty:
    for row in scene.machine.servers():
        _kill(scene, row, signal.SIGKILL)
    yield


@fault("a server is killed while it loads", SERVER_DIED, weight=2)
def kill_loading(scene: Scene) -> Faulty:
    """F18: whoever waits for it is served by a second try."""
    model = "slow-load"
    scene.judged("operation", model, operation(model, "unload"))
    scene.beside(lambda: scene.judged("plain", model, chat(model), "ok"))
    scene.await_(lambda: _started(scene, model), "a load that has begun")
    for row in scene.machine.servers("starting", model=model):
        _kill(scene, row, signal.SIGKILL)
    yield
    scene.await_(lambda: scene.warm(model), "loaded after all")


def _started(scene: Scene, model: str) -> bool:
    return any(row["pid"] for row in scene.machine.servers("starting", model=model))


@fault("a draining server is killed", SERVER_DIED)
def kill_draining(scene: Scene) -> Faulty:
    model = "bad-answers"
    slow = chat(model, stream=True, tokens=100, token_s=0.03)
    scene.warm(model)
    scene.beside(lambda: scene.judged("stream", model, slow))
    time.sleep(0.3)
    scene.beside(lambda: scene.judged("operation", model, operation(model, "unload")))
    becomes(lambda: scene.machine.servers("draining", model=model), within_s=3)
    for row in scene.machine.servers("draining", model=model):
        _kill(scene, row, signal.SIGKILL)
    yield


@fault("a stopping server is killed")
def kill_stopping(scene: Scene) -> Faulty:
    model = "slow-exit"
    scene.warm(model)
    scene.beside(lambda: scene.judged("operation", model, operation(model, "unload")))
    becomes(lambda: scene.machine.servers("stopping", model=model), within_s=3)
    for row in scene.machine.servers("stopping", model=model):
        _kill(scene, row, signal.SIGKILL)
    yield


@fault("a ready server is stopped for a while", hold_s=(0.5, 3.0), weight=2)
def stop_ready(scene: Scene) -> Faulty:
    row = _ready(scene)
    _kill(scene, row, signal.SIGSTOP)
    yield
    _kill(scene, row, signal.SIGCONT)


@fault("a server is stopped while it loads, for good", "load_timeout")
def stop_loading(scene: Scene) -> Faulty:
    model = "slow-load"
    scene.judged("operation", model, operation(model, "unload"))
    scene.beside(lambda: scene.judged("plain", model, chat(model)))
    scene.await_(lambda: _started(scene, model), "a load that has begun")
    for row in scene.machine.servers("starting", model=model):
        _kill(scene, row, signal.SIGSTOP)
    yield
    scene.settle(30)
    _load_again(scene, model)


def _load_again(scene: Scene, model: str) -> None:
    """A load by a person overrides the back-off after a failure."""
    scene.judged("operation", model, operation(model, "load"), "ok")


def _armed_load(scene: Scene, model: str, *right: str) -> None:
    """Have a model load in its bad manner, and once more without."""
    scene.judged("operation", model, operation(model, "unload"))
    scene.machine.arm(model)
    scene.judged("plain", model, chat(model), *right)
    scene.machine.disarm(model)
    _load_again(scene, model)


@fault("a load makes no progress", "load_timeout")
def silent_load(scene: Scene) -> Faulty:
    _armed_load(scene, "silent", "load_timeout")
    yield


@fault("a load runs out of GPU memory once")
def out_of_memory_once(scene: Scene) -> Faulty:
    _armed_load(scene, scene.chooser.choice(("oom-once", "oom-kv-once")), "ok")
    yield


@fault("a load fails for a bad file", LOAD_FAILED)
def bad_model_once(scene: Scene) -> Faulty:
    _armed_load(scene, "bad-once", "model_load_failed")
    yield


@fault("a server aborts while it loads", LOAD_FAILED)
def aborts_loading(scene: Scene) -> Faulty:
    _armed_load(scene, "aborts-loading", "ok", "model_load_failed")
    yield


@fault("a server dies by itself when it is ready", SERVER_DIED)
def dies_ready(scene: Scene) -> Faulty:
    _armed_load(scene, "dies-ready")
    time.sleep(0.5)
    scene.await_(lambda: scene.warm("dies-ready"), "loaded again")
    yield


def _armed_request(scene: Scene, model: str, *right: str, stream: bool = False) -> None:
    scene.warm(model)
    scene.machine.arm(model)
    kind = "stream" if stream else "plain"
    # the manner's own knob stands in the model's configuration; armed after it was loaded
    scene.judged(kind, model, chat(model, stream=stream), *right)
    scene.machine.disarm(model)


@fault("a server dies of a request, before a byte", SERVER_DIED, weight=2)
def dies_at_request(scene: Scene) -> Faulty:
    model = scene.chooser.choice(("dies-at-request", "segv-at-request", "cuda-oom-at-request"))
    _armed_request(scene, model, "ok")
    yield


@fault("a server dies in the middle of a stream", SERVER_DIED, weight=2)
def dies_mid_stream(scene: Scene) -> Faulty:
    _armed_request(scene, "dies-mid-stream", "backend_failed", stream=True)
    yield


@fault("a server dies in the middle of a whole answer", SERVER_DIED)
def dies_mid_answer(scene: Scene) -> Faulty:
    _armed_request(scene, "dies-mid-stream", "ok", "backend_failed")
    yield


@fault("a server says nothing to a request", "upstream_timeout")
def hangs_at_request(scene: Scene) -> Faulty:
    _armed_request(scene, "hangs-at-request", "upstream_timeout", "backend_failed")
    yield


@fault("a client leaves a server that says nothing")
def leave_what_hangs(scene: Scene) -> Faulty:
    model = "bad-answers"
    scene.warm(model)
    with socket.create_connection(("127.0.0.1", scene.port)) as sock:
        sock.sendall(chat(model, hang_on_request=1))
        time.sleep(0.5)
    scene.await_(lambda: not _busy(scene, model), "the server's slot is free again")
    yield


def _busy(scene: Scene, model: str) -> int:
    rows = scene.machine.proxy.rows(
        "SELECT coalesce(sum(in_flight), 0) AS n FROM leases JOIN servers ON servers.id ="
        f" server_id WHERE model_id = '{model}' AND state = 'ready'"
    )
    return int(rows[0]["n"])


@fault("a server answers 500 to everything asked of it")
def answers_500(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    for status in (500, 503, 429, 400):
        answer = scene.raw(chat("bad-answers", status=status))
        wrong = f"a server's {status} became {answer.status} {answer.failure or answer.code}"
        scene.expect(answer.status == status and not answer.code, wrong)
    yield


@fault("a server ends a stream with an error of its own")
def error_mid_stream(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    answer = scene.raw(chat("bad-answers", stream=True, error_mid_stream=2))
    verdict = judge("stream", answer)
    scene.expect(verdict.word == "500", f"a server's own error event became {verdict}")
    yield


@fault("a server sends what is not HTTP", SERVER_DIED)
def sends_garbage(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    for text in ("garbage", "early"):
        scene.judged("plain", "bad-answers", chat("bad-answers", broken=text), "backend_failed")
    yield


@fault("a server sends less than it says", Failure.TORN)
def sends_less(scene: Scene) -> Faulty:
    """Its head is on the way already: only a cut tells the client that this is not all."""
    scene.warm("bad-answers")
    scene.judged("plain", "bad-answers", chat("bad-answers", broken="length"), Failure.TORN)
    yield


@fault("a server cuts a stream", SERVER_DIED)
def cuts_stream(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    for text in ("cut", "chunk"):
        body = chat("bad-answers", stream=True, broken=text)
        scene.judged("stream", "bad-answers", body, "backend_failed")
    yield


@fault("a server is slow")
def slow(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    body = chat("bad-answers", stream=True, tokens=10, first_token_s=1.0, token_s=0.1)
    scene.judged("stream", "bad-answers", body, "ok")
    yield


@fault("a server does not end when it is told to", weight=0.5)
def ignores_term(scene: Scene) -> Faulty:
    scene.warm("ignores-term")
    scene.judged("operation", "ignores-term", operation("ignores-term", "unload"), "ok")
    scene.expect(not scene.machine.servers(model="ignores-term"), "it is still there")
    yield


@fault("a server has one thread, and its /health waits behind a stream")
def one_thread(scene: Scene) -> Faulty:
    model = "one-thread"
    scene.warm(model)
    body = chat(model, stream=True, tokens=30, token_s=0.05)
    for _ in range(2):
        scene.beside(lambda: scene.judged("stream", model, body, "ok"))
    yield


@fault("a client reads nothing of a long stream")
def never_reads(scene: Scene) -> Faulty:
    scene.warm("bad-answers")
    with socket.create_connection(("127.0.0.1", scene.port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(chat("bad-answers", stream=True, tokens=2000))
        time.sleep(1.0)
        answer = read_answer(sock)
    scene.expect(answer.failure in (None, Failure.TORN), f"a slow reader got {answer.failure}")
    yield
