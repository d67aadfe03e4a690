"""The stand-in llama-server's bad manners, one test a knob."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.client import BadStatusLine, HTTPException, IncompleteRead
from pathlib import Path

import pytest

from tests.support.fakes.running import Running, gguf_stub, running, wait_for
from tests.support.ports import free_port

#: a request that lasts until somebody ends it
LONG = {"prompt": "Count", "max_tokens": 100_000, "stream": True}
PACE = "token_s=0.02"


@pytest.fixture
def bad(tmp_path: Path) -> Callable[..., AbstractContextManager[Running]]:
    """Start a stand-in with these knobs."""

    def begin(knobs: str, *arguments: str) -> AbstractContextManager[Running]:
        return running(tmp_path, "--metrics", *arguments, "--fake", knobs)

    return begin


Bad = Callable[..., AbstractContextManager[Running]]


def test_unknown_knob_is_an_error(bad: Bad) -> None:
    with bad("load_seconds=1") as server:
        assert server.end() == 1
        assert "no such knob: load_seconds" in server.log.read_text()


def test_slow_load_shows_progress(bad: Bad) -> None:
    with bad("load_s=0.4") as server:
        server.wait_ready()
        assert server.log.read_text().count("load_tensors: loaded") == 4


def test_silent_load_never_gets_ready_and_says_nothing(bad: Bad) -> None:
    with bad("silent_load") as server:
        wait_for(lambda: server.status() == 503, "the open port")
        # its last words, maybe after the port is open
        wait_for(lambda: "loading model '" in server.log.read_text(), "the beginning of the load")
        size = server.log.stat().st_size
        with pytest.raises(subprocess.TimeoutExpired):
            server.end(0.5)
        assert (server.status(), server.log.stat().st_size) == (503, size)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("oom", "cudaMalloc failed: out of memory"),
        ("oom_kv", "failed to allocate buffer for kv cache"),
        ("oom_compute", "failed to allocate compute pp buffers"),
        ("bad_model", "model is corrupted or incomplete"),
        ("arch", "unknown model architecture"),
        ("too many cooks", "error loading model: too many cooks"),
    ],
)
def test_failed_load_says_why_and_ends_with_status_one(bad: Bad, what: str, line: str) -> None:
    with bad(f"fail_load={what}") as server:
        assert server.end() == 1
        log = server.log.read_text()
    assert line in log
    assert log.endswith("E srv  llama_server: exiting due to model loading error\n")


def test_once_lets_only_the_first_process_fail(bad: Bad, tmp_path: Path) -> None:
    knobs = f"fail_load=oom,once={tmp_path / 'failed'}"
    with bad(knobs) as first:
        assert first.end() == 1
    with bad(knobs) as second:
        second.wait_ready()


@pytest.mark.parametrize(
    ("how", "status"),
    [("abort", -signal.SIGABRT), ("segv", -signal.SIGSEGV), ("kill", -signal.SIGKILL), ("exit", 1)],
)
def test_crash_on_request_sends_no_byte(bad: Bad, how: str, status: int) -> None:
    with bad(f"crash_on_request=2,crash={how}") as server:
        server.wait_ready().post("/v1/completions", {"prompt": "a"})
        with pytest.raises((BadStatusLine, ConnectionError)):
            server.post("/v1/completions", {"prompt": "a"})
        assert server.end() == status
        assert server.seen("crash")


def test_crash_in_the_middle_of_a_stream_cuts_it(bad: Bad) -> None:
    with bad("crash_mid_stream=3") as server:
        connection = server.wait_ready().begin("/v1/completions", LONG)
        with pytest.raises((IncompleteRead, ConnectionError)) as cut:
            connection.getresponse().read()
        assert server.end() == -signal.SIGABRT
    if isinstance(cut.value, IncompleteRead):
        assert cut.value.partial.count(b"data: ") == 3


def test_crash_after_ready(bad: Bad) -> None:
    with bad("crash_after_ready_s=0.2,crash=segv") as server:
        server.wait_ready()
        assert server.end() == -signal.SIGSEGV


def test_hanging_request_holds_its_slot_until_the_client_leaves(bad: Bad) -> None:
    with bad("hang_on_request", "--parallel", "1") as server:
        connection = server.wait_ready().begin("/v1/completions", {"prompt": "a"})
        wait_for(lambda: server.busy_slots() == 1, "a busy slot")
        connection.close()
        wait_for(lambda: server.seen("cancelled"), "the cancellation")
        wait_for(lambda: server.busy_slots() == 0, "a free slot")


def test_sticking_generation_ignores_that_the_client_left(bad: Bad) -> None:
    with bad("stick,token_s=0.01") as server:
        body = {"prompt": "a", "max_tokens": 30, "stream": True}
        server.wait_ready().begin("/v1/completions", body).close()
        wait_for(lambda: server.metric("tokens_predicted_total") == 30, "all 30 tokens")


def test_error_event_ends_a_stream_without_done(bad: Bad) -> None:
    with bad("") as server:
        body = {"prompt": "a", "stream": True, "fake": {"error_mid_stream": 2}}
        events = server.wait_ready().post("/v1/completions", body).events()
    assert [next(iter(event)) for event in events] == ["choices", "choices", "error"]


def test_status_knob_of_a_request_answers_with_that_error(bad: Bad) -> None:
    with bad("") as server:
        body = {"prompt": "a", "fake": {"status": 503}}
        reply = server.wait_ready().post("/v1/completions", body)
        assert (reply.status, reply.json()["error"]["type"]) == (503, "unavailable_error")
        assert server.post("/v1/completions", {"prompt": "a"}).status == 200


@pytest.mark.parametrize("how", ["early", "garbage", "length"])
def test_broken_answers_are_no_http(bad: Bad, how: str) -> None:
    with bad("") as server:
        server.wait_ready()
        with pytest.raises((HTTPException, OSError)):
            server.post("/v1/completions", {"prompt": "a", "fake": {"broken": how}})
        assert server.post("/v1/completions", {"prompt": "a"}).status == 200


@pytest.mark.parametrize("how", ["cut", "chunk"])
def test_broken_streams_have_no_end(bad: Bad, how: str) -> None:
    with bad("") as server:
        body = {"prompt": "a", "stream": True, "fake": {"broken": how}}
        with pytest.raises((HTTPException, ValueError)):
            server.wait_ready().post("/v1/completions", body)


def test_no_health_never_answers_but_works(bad: Bad) -> None:
    with bad("no_health") as server:
        wait_for(lambda: server.status("/v1/models") == 200, "ready")
        server.begin("/tokenize", {"content": "a"}).getresponse().read()
        connection = server.begin("/v1/completions", {"prompt": "a"})
        connection.getresponse().read()
        connection.request("GET", "/health")
        assert connection.sock is not None
        connection.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.getresponse()


def test_taken_http_threads_keep_health_waiting(bad: Bad) -> None:
    with bad("http_threads=2,token_s=0.02") as server:
        connections = [server.wait_ready().begin("/v1/completions", LONG) for _ in range(2)]
        wait_for(lambda: len(server.seen("request")) >= 3, "both requests")
        waiting = server.begin("/tokenize", {"content": "a"})
        assert waiting.sock is not None
        waiting.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.getresponse()
        for connection in connections:
            connection.close()
        server.wait_ready()


def test_ignored_sigterm_leaves_the_server_at_work(bad: Bad) -> None:
    with bad("ignore_term=2") as server:
        server.wait_ready()
        for count in (1, 2):
            server.terminate()
            wait_for(lambda count=count: len(server.seen("signal")) == count, "the signal")  # type: ignore[misc]
        assert server.status() == 200
        server.terminate()
        assert server.end() == 0


def test_ignored_sigterm_counts_while_loading_too(bad: Bad) -> None:
    with bad("ignore_term=1,load_s=0.5") as server:
        wait_for(lambda: server.status() == 503, "the open port")
        server.terminate()
        server.wait_ready()


def test_slow_exit_takes_its_time(bad: Bad) -> None:
    with bad("slow_exit_s=0.6") as server:
        server.wait_ready().terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.end(0.3)
        assert server.end() == 0


def test_busy_server_hangs_on_sigterm_as_long_as_told(bad: Bad) -> None:
    with bad(f"term_hang_s=0.6,{PACE}") as server:
        connection = server.wait_ready().begin("/v1/completions", LONG)
        wait_for(lambda: server.busy_slots() == 1, "a busy slot")
        server.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.end(0.3)
        assert server.end() == 0
        with pytest.raises((HTTPException, ConnectionError)):
            connection.getresponse().read()


def test_journal_tells_what_was_seen(bad: Bad) -> None:
    with bad("") as server:
        server.wait_ready().request("POST", "/tokenize", b'{"content": "x"}', **{"X-Test": "y"})
        server.terminate()
        server.end()
    started, request = server.seen("started")[0], server.seen("request")[-1]
    assert started["pid"] == server.process.pid
    assert "--port" in started["argv"]
    assert "PATH" in started["env"]
    assert (request["method"], request["path"]) == ("POST", "/tokenize")
    assert request["headers"]["x-test"] == "y"
    assert (request["body_bytes"], request["body"]) == (16, '{"content": "x"}')
    assert server.seen("exit")[0]["status"] == 0


def test_tokenize_and_back(bad: Bad) -> None:
    with bad("") as server:
        tokens = server.wait_ready().post("/tokenize", {"content": "hé"}).json()
        assert server.post("/detokenize", tokens).json() == {"content": "hé"}


def test_embeddings_and_ranks_where_asked_for(bad: Bad) -> None:
    with bad("", "--embedding", "--reranking") as server:
        answer = server.wait_ready().post("/v1/embeddings", {"input": ["a", "b"]}).json()
        ranks = server.post("/v1/rerank", {"query": "q", "documents": ["a", "b"]}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert answer["data"][0]["embedding"] != answer["data"][1]["embedding"]
    assert [entry["index"] for entry in ranks["results"]] == [0, 1]


def test_chunked_and_large_bodies_arrive_whole(bad: Bad) -> None:
    with bad("") as server:
        server.wait_ready()
        connection = server.begin("/tokenize", {"content": "a"})
        connection.getresponse().read()
        pieces = [b'{"content": "', b"x" * 2_000_000, b'"}']
        connection.request("POST", "/tokenize", iter(pieces), encode_chunked=True)
        answer = connection.getresponse()
        assert len(answer.read()) > 2_000_000
        assert server.seen("request")[-1]["body_bytes"] == 2_000_015


def test_model_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = gguf_stub(tmp_path)
    path.write_bytes(b"nonsense")
    with running(tmp_path, model=path) as server:
        assert server.end() == 1
        assert "invalid magic characters" in server.log.read_text()


def test_port_zero_is_told_in_the_log(tmp_path: Path) -> None:
    with running(tmp_path, "--port", "0", port=free_port()) as server:
        wait_for(lambda: "listening on" in server.log.read_text(), "the port")
        server.port = int(server.log.read_text().rsplit(":", 1)[1])
        assert server.status() == 200
