"""A real llama-server asked directly and through the proxy: the answers are the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.differential_cases import CASES, JSON_TYPE, MODEL, ORIGIN, Case
from tests.support.running import REAL_MODEL, running
from tests.support.wire import PAGE, Answer, Wire

#: of the connection and not of the answer; of an answer's age; for an nginx in front
OWN_HEADERS = frozenset({"connection", "keep-alive", "date", "x-accel-buffering"})
#: which pages may read it: a server says all of them, the proxy those that are allowed
PAGES = ("access-control-", "vary")
#: of a body's framing: the numbers in an answer have as many digits as they have
FRAMING = frozenset({"content-length", "transfer-encoding"})
#: fields that no two answers of one server have in common
VOLATILE = re.compile(
    r"id|created|created_at|completed_at|timings|id_task|item_id|response_id|call_id|t_\w+"
    # how much of a prompt the slot that took it still had depends on the requests before
    r"|cached_tokens|cache_read_input_tokens"
)


@dataclass(frozen=True)
class Pair:
    """One server, reached in two ways."""

    direct: tuple[str, int]
    api_key: str
    proxy: tuple[str, int]

    def ask_directly(self, case: Case) -> Answer:
        key = ("Authorization", f"Bearer {self.api_key}")
        return exchange(self.direct, case, case.request(case.direct_target or case.target, key))

    def ask_proxy(self, case: Case) -> Answer:
        return exchange(self.proxy, case, case.request(case.target))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    models = {MODEL: {"path": str(REAL_MODEL), "aliases": ["small"]}}
    folder = tmp_path_factory.mktemp("differential")
    with running(folder, models, real=True, allowed_origins=[PAGE]) as proxy:
        assert proxy.chat(MODEL).status_code == 200
        (server,) = proxy.rows("SELECT port, api_key FROM servers WHERE state = 'ready'")
        yield Pair(("127.0.0.1", server["port"]), server["api_key"], ("127.0.0.1", proxy.port))


def exchange(address: tuple[str, int], case: Case, request: bytes) -> Answer:
    with Wire(address, timeout_s=60) as wire:
        if any(name == "Expect" for name, _ in case.headers):
            head, end, request = request.partition(b"\r\n\r\n")
            wire.send(head + end)
            assert wire.read_head() == (100, [])
        wire.send(request)
        return wire.read_answer(head_only=case.method == "HEAD")


def test_there_are_enough_requests() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_proxy_answers_as_its_server_does(pair: Pair, case: Case) -> None:
    direct, through = pair.ask_directly(case), pair.ask_proxy(case)
    assert through.status == direct.status
    assert headers_that_matter(through) == headers_that_matter(direct)
    assert content(through) == content(direct)
    assert (through.chunks is None) == (direct.chunks is None)
    if through.chunks is None and case.method != "HEAD":
        assert through.header("content-length") == str(len(through.body))


def headers_that_matter(answer: Answer) -> list[tuple[str, str]]:
    kept = [(name.lower(), value) for name, value in answer.headers]
    return sorted(
        pair
        for pair in kept
        if pair[0] not in OWN_HEADERS | FRAMING and not pair[0].startswith(PAGES)
    )


def content(answer: Answer) -> Any:
    """Return a body without what differs between any two answers of the same server."""
    kind = answer.header("content-type") or ""
    if not answer.body:
        return b""
    if kind.startswith("text/event-stream"):
        return [event(block) for block in answer.body.decode().split("\n\n")]
    if kind.startswith("application/json"):
        return steady(answer.json())
    return answer.body


def event(block: str) -> Any:
    """Return one event's lines, the data read as JSON; the keys' order counts here."""
    lines: list[Any] = []
    for line in block.split("\n"):
        field, _, value = line.partition(": ")
        lines.append((field, json.dumps(steady(json.loads(value)))) if value[:1] == "{" else line)
    return lines


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        if "cache_read_input_tokens" in value:  # the prompt's tokens, the cached ones apart
            cached = value["cache_read_input_tokens"]
            value = {**value, "input_tokens": value["input_tokens"] + cached}
        return {
            key: "*" if VOLATILE.fullmatch(key) and not isinstance(inner, list) else steady(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [steady(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


def error_of(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.header("x-smartproxy-error") == error["code"]
    assert answer.header("content-type") == "application/json"
    return error


CHAT = "/v1/chat/completions"
OWN_ANSWERS = [
    ("bad JSON", "POST", CHAT, b'{"model": ', 400, "invalid_json"),
    ("empty body", "POST", CHAT, b"", 400, "invalid_json"),
    ("JSON that is no object", "POST", "/v1/embeddings", b"[1]", 400, "invalid_json"),
    ("bytes that are no text", "POST", "/tokenize", b'{"model": "\xff"}', 400, "invalid_json"),
    ("no model", "POST", CHAT, b'{"messages": []}', 400, "model_required"),
    ("model of a wrong type", "POST", "/completion", b'{"model": 7}', 400, "model_required"),
    ("unknown model", "POST", CHAT, b'{"model": "smollm2-135n"}', 404, "model_not_found"),
    ("unknown model upstream", "GET", "/upstream/nobody/props", b"", 404, "model_not_found"),
    ("unknown route", "GET", "/v1/nothing", b"", 404, "not_found"),
    ("unknown route, other body", "POST", "/v1/nothing", b"not JSON", 404, "not_found"),
    ("unknown route, unknown model", "GET", "/props?model=nobody", b"", 404, "not_found"),
    ("GET of a POST route", "GET", CHAT, b"", 404, "not_found"),
    ("POST of a GET route", "POST", "/v1/models", b"", 404, "not_found"),
]


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "code"),
    [case[1:] for case in OWN_ANSWERS],
    ids=[case[0] for case in OWN_ANSWERS],
)
def test_proxy_answers_itself_where_no_server_is_named(
    pair: Pair, method: str, target: str, body: bytes, status: int, code: str
) -> None:
    case = Case(name="", method=method, target=target, body=body, headers=(JSON_TYPE,))
    answer = pair.ask_proxy(case)
    assert (answer.status, error_of(answer)["code"]) == (status, code)


def test_unknown_model_is_told_the_nearest_name(pair: Pair) -> None:
    case = Case(name="", target="/tokenize", body={"model": "smollm2-135n"})
    assert MODEL in error_of(pair.ask_proxy(case))["message"]


def test_alias_is_answered_by_the_same_server(pair: Pair) -> None:
    named = Case(name="", target="/tokenize", body={"model": MODEL, "content": "hello"})
    other = Case(name="", target="/tokenize", body={"model": "small", "content": "hello"})
    assert pair.ask_proxy(other).body == pair.ask_proxy(named).body


def test_head_of_a_route_of_ours_has_no_body(pair: Pair) -> None:
    case = Case(name="", method="HEAD", target="/v1/models")
    with Wire(pair.proxy) as wire:
        head = wire.send(case.request(case.target, ("Connection", "close"))).read_answer(True)
        assert wire.read_to_end() == b""
    assert head.status == 200
    assert head.header("content-type") == "application/json"


def test_one_connection_carries_many_answers(pair: Pair) -> None:
    words = Case(name="", target="/tokenize", body={"model": MODEL, "content": "one two"})
    unknown = Case(name="", target="/v1/nothing", method="GET")
    with Wire(pair.proxy) as wire:
        answers = [
            wire.send(case.request(case.target)).read_answer()
            for case in (words, unknown, words, unknown, words)
        ]
    assert [answer.status for answer in answers] == [200, 404, 200, 404, 200]


def test_preflight_needs_no_model_and_allows_what_the_server_allows(pair: Pair) -> None:
    asked = (ORIGIN, ("Access-Control-Request-Method", "POST"))
    case = Case(name="", method="OPTIONS", target=CHAT, headers=asked)
    direct, through = pair.ask_directly(case), pair.ask_proxy(case)
    assert (through.status, through.body) == (direct.status, direct.body)
    header = "Access-Control-Allow-Origin"
    assert through.header(header) == direct.header(header)
    # some builds list more methods than their routes for models have
    assert "GET, POST" in (through.header("Access-Control-Allow-Methods") or "")
