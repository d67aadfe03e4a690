"""Every decision on a request is the same on the plain way and on Flask's, in the real worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from smartproxy.proxy.inference import INFERENCE_PATHS
from smartproxy.proxy.worker.plain import MAX_BODY_BYTES, incoming_of, plain_request
from tests.support.running import Proxy, fake_model, running
from tests.support.wire import PAGE, Answer, Wire

CHAT = "/v1/chat/completions"
KEY = "Authorization: Bearer client-key\r\n"
#: gunicorn drops it, as CGI can't tell it from X-Neutral; for the plain way it is not plain
OTHER_WAY = "X_Neutral: 1\r\n"
JSON = "Content-Type: application/json\r\n"
TEXT = "Content-Type: text/plain\r\n"
OTHER_PAGE = "Origin: https://other.example\r\n"
BOUNDARY = "Content-Type: multipart/form-data; boundary=b\r\n"


def chat(model: Any = "m", **fields: Any) -> bytes:
    return json.dumps({"model": model, "messages": [], **fields}).encode()


def form(**fields: str) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    return "".join([*parts, "--b--\r\n"]).encode()


@dataclass(frozen=True)
class Case:
    name: str
    status: int
    code: str | None = None
    method: str = "POST"
    target: str = CHAT
    body: bytes = chat()
    headers: str = KEY
    host: str = "p"
    #: takes the plain way when it may
    plain: bool = True

    def request(self, extra: str) -> bytes:
        head = f"{self.method} {self.target} HTTP/1.1\r\nHost: {self.host}\r\n"
        head += f"Content-Length: {len(self.body)}\r\n{self.headers}{extra}\r\n"
        return head.encode("latin-1") + self.body


CASES = [
    Case("accepted", 200),
    Case("stream", 200, body=chat(stream=True)),
    Case("alias", 200, body=chat("short")),
    Case("blanks_around_a_name", 200, body=chat(" m ")),
    Case("id_with_slash", 200, body=chat("org/model")),
    Case("default_model", 200, body=b'{"messages": []}'),
    Case("empty_name", 200, body=chat("")),
    Case("null_name", 200, body=chat(None)),
    Case("model_in_query", 200, target=CHAT + "?model=short", body=b'{"messages": []}'),
    Case("unknown_in_query", 404, "model_not_found", target=CHAT + "?model=x%20y", body=b"{}"),
    Case("empty_in_query", 200, target=CHAT + "?model=", body=b'{"messages": []}'),
    Case("body_wins_over_query", 200, target=CHAT + "?model=zzz"),
    Case("unknown_model", 404, "model_not_found", body=chat("shrot")),
    Case("long_model", 404, "model_not_found", body=chat("x" * 5000)),
    Case("number_as_name", 400, "model_required", body=chat(7)),
    Case("list_as_name", 400, "model_required", body=chat(["m"])),
    Case("bad_json", 400, "invalid_json", body=b'{"model": "m", nope'),
    Case("bad_utf8", 400, "invalid_json", body=b'{"model": "\xff"}'),
    Case("empty_body", 400, "invalid_json", body=b""),
    Case("list_body", 400, "invalid_json", body=b'[{"model": "m"}]'),
    Case("string_body", 400, "invalid_json", body=b'"m"'),
    Case("null_body", 400, "invalid_json", body=b"null"),
    Case("byte_order_mark", 200, body=b"\xef\xbb\xbf" + chat()),
    Case("nan", 200, body=b'{"model": "m", "messages": [], "x": NaN}'),
    Case("deep", 400, "invalid_json", body=b'{"model": "m", "x": ' + b"[" * 100_000),
    Case(
        "deep_and_whole",
        200,
        body=b'{"model":"m","messages":[],"x":' + b"[" * 500 + b"]" * 500 + b"}",
    ),
    Case("repeated_field", 404, "model_not_found", body=b'{"model": "m", "model": "zzz"}'),
    Case("too_large", 413, "request_too_large", body=b" " * (1 << 20) + chat(), plain=False),
    Case(
        "too_large_without_key",
        413,
        "request_too_large",
        body=b" " * (2 << 20),
        headers="",
        plain=False,
    ),
    Case(
        "form", 404, "model_not_found", headers=KEY + BOUNDARY, body=form(model="zzz"), plain=False
    ),
    Case(
        "broken_form", 400, "bad_request", headers=KEY + BOUNDARY, body=b"--b\r\nnope", plain=False
    ),
    Case(
        "json_called_text",
        404,
        "model_not_found",
        headers=KEY + "Content-Type: text/plain\r\n",
        body=chat("zzz"),
    ),
    Case("no_key", 401, "invalid_api_key", headers=""),
    Case("wrong_key", 401, "invalid_api_key", headers="Authorization: Bearer nope\r\n"),
    Case("empty_key", 401, "invalid_api_key", headers="Authorization: Bearer  \r\n"),
    Case("other_scheme", 401, "invalid_api_key", headers="Authorization: Basic client-key\r\n"),
    Case("small_scheme", 200, headers="authorization: bearer  client-key \r\n"),
    Case("x_api_key", 200, headers="x-api-key: client-key\r\n"),
    Case("wrong_x_api_key", 401, "invalid_api_key", headers="X-Api-Key: client-kez\r\n"),
    Case(
        "two_keys",
        401,
        "invalid_api_key",
        headers="X-Api-Key: a\r\nX-Api-Key: client-key\r\n",
        plain=False,
    ),
    Case("admin_key", 200, headers="X-Api-Key: admin-key\r\n"),
    Case("key_of_latin_letters", 401, "invalid_api_key", headers="X-Api-Key: k\xe9y\r\n"),
    Case("no_key_and_bad_json", 401, "invalid_api_key", headers="", body=b"{"),
    Case(
        "origin",
        404,
        "model_not_found",
        headers=KEY + JSON + f"Origin: {PAGE}\r\n",
        body=chat("zzz"),
    ),
    Case("allowed_page", 200, headers=KEY + f"Origin: {PAGE}\r\n"),
    Case("page_of_this_machine", 200, headers=KEY + "Origin: http://localhost:3000\r\n"),
    Case("own_page", 200, headers=KEY + "Origin: http://p\r\n"),
    Case("other_page", 403, "origin_not_allowed", headers=KEY + OTHER_PAGE),
    Case("other_page_by_text", 403, "origin_not_allowed", headers=KEY + TEXT + OTHER_PAGE),
    Case("page_passed_on_by_a_program", 200, headers=KEY + JSON + OTHER_PAGE),
    Case(
        "other_site_that_says_no_origin",
        403,
        "origin_not_allowed",
        headers=KEY + "Sec-Fetch-Site: cross-site\r\n",
    ),
    Case("other_host", 403, "host_not_allowed", host="evil.example"),
    Case("other_host_without_key", 403, "host_not_allowed", host="evil.example:80", headers=""),
    Case("address_as_host", 200, host="192.168.7.7:8000"),
    Case("six_as_host", 200, host="[::1]:8000"),
    Case("capital_host", 200, host="LOCALHOST."),
    Case("no_name_as_host", 200, host=""),
    Case("page_without_key", 401, "invalid_api_key", headers=JSON + "Origin: null\r\n"),
    Case(
        "connection_close",
        404,
        "model_not_found",
        headers=KEY + "Connection: close\r\n",
        body=chat("zzz"),
    ),
    Case(
        "quoted_path",
        404,
        "model_not_found",
        target="/v1/chat%2Fcompletions",
        body=chat("zzz"),
        plain=False,
    ),
    Case(
        "quoted_letter",
        404,
        "model_not_found",
        target="/v1/ch%61t/completions",
        body=chat("zzz"),
        plain=False,
    ),
    Case("two_slashes", 404, "model_not_found", target="/" + CHAT, body=chat("zzz"), plain=False),
    Case("dots", 404, "not_found", target="/v1/../v1/nope", body=chat("zzz"), plain=False),
    Case("slash_at_the_end", 404, "not_found", target=CHAT + "/", body=chat("zzz"), plain=False),
    Case("capitals", 404, "not_found", target=CHAT.upper(), body=chat("zzz"), plain=False),
    Case("unknown_path", 404, "not_found", target="/v9/new", body=chat("zzz"), plain=False),
    Case("get_on_inference", 404, "not_found", method="GET", body=b"", plain=False),
    Case("put", 404, "not_found", method="PUT", body=chat("zzz"), plain=False),
    Case("head", 404, None, method="HEAD", body=b"", plain=False),
    Case(
        "options",
        200,
        None,
        method="OPTIONS",
        body=b"",
        headers="Origin: http://localhost\r\n",
        plain=False,
    ),
    Case(
        "preflight_of_an_allowed_page",
        200,
        method="OPTIONS",
        target="/upstream/m/props",
        body=b"",
        headers=f"Origin: {PAGE}\r\n",
        plain=False,
    ),
    Case(
        "preflight_of_another_page",
        403,
        "origin_not_allowed",
        method="OPTIONS",
        body=b"",
        headers=OTHER_PAGE,
        plain=False,
    ),
    Case(
        "preflight_of_an_operation",
        403,
        "origin_not_allowed",
        method="OPTIONS",
        target="/api/models/m/unload",
        body=b"",
        headers=f"Origin: {PAGE}\r\n",
        plain=False,
    ),
    Case(
        "upstream_by_a_picture",
        403,
        "origin_not_allowed",
        method="GET",
        target="/upstream/m/props",
        body=b"",
        headers=KEY + "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n",
        plain=False,
    ),
    Case(
        "upstream",
        200,
        None,
        method="GET",
        target="/upstream/org/model/props?a=%20",
        body=b"",
        plain=False,
    ),
    Case("upstream_unknown", 404, "model_not_found", target="/upstream/zzz/props", plain=False),
    Case(
        "upstream_without_key",
        401,
        "invalid_api_key",
        target="/upstream/m/props",
        headers="",
        plain=False,
    ),
    Case(
        "long_head",
        404,
        "model_not_found",
        headers=KEY + f"X-Long: {'x' * 9000}\r\n",
        body=chat("zzz"),
        plain=False,
    ),
    Case("huge_field", 431, None, headers=KEY + f"X-Huge: {'x' * 20000}\r\n", plain=False),
    Case(
        "huge_head",
        431,
        None,
        headers=KEY + f"X-Huge: {'x' * 70000}\r\n",
        plain=False,
    ),
    Case("many_fields", 431, None, headers=KEY + "X-A: 1\r\n" * 150, plain=False),
]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    models: dict[str, Any] = {"m": {**fake_model(), "aliases": ["short"]}}
    models |= {"org/model": fake_model(), "gone": {"path": "nowhere/gone.gguf"}}
    settings: dict[str, Any] = {"default_model": "m", "max_body_mb": 1}
    settings |= {"allowed_origins": [PAGE]}
    settings |= {"api_keys": ["client-key"], "admin_keys": ["admin-key"]}
    with running(tmp_path_factory.mktemp("ways"), models, **settings) as started:
        yield started


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_decide_alike(proxy: Proxy, case: Case) -> None:
    assert takes_plain_way(case.request("")) is case.plain
    assert not takes_plain_way(case.request(OTHER_WAY))
    first, second = ask(proxy, case, ""), ask(proxy, case, OTHER_WAY)
    assert first.status == case.status, first.body
    if case.code:
        assert first.header("x-smartproxy-error") == first.json()["error"]["code"] == case.code
    assert said(first) == said(second)


@pytest.mark.parametrize("way", ["", OTHER_WAY], ids=["plain", "framework"])
@pytest.mark.parametrize("stream", [False, True])
def test_only_an_admin_is_told_paths_and_processes(proxy: Proxy, way: str, stream: bool) -> None:
    def asked(target: str, headers: str) -> Answer:
        return ask(proxy, Case("", 200, None, "GET", target, b"", headers), way)

    for key, told in ((KEY, False), ("X-Api-Key: admin-key\r\n", True)):
        failed = ask(proxy, Case("", 503, body=chat("gone", stream=stream), headers=key), way)
        assert failed.status in (404, 503)
        assert b"gone.gguf" in failed.body
        for answer in (failed, asked("/v1/models", key)):
            assert (str(proxy.folder) in answer.body.decode()) is told
        manager = asked("/health", key).json()["manager"]
        assert (manager["pid"] is not None, manager["llama_server"] is not None) == (told, told)
    assert set(asked("/health", "").json()) <= {"status", "mode", "reasons"}


def takes_plain_way(request: bytes) -> bool:
    head, _, body = request.partition(b"\r\n\r\n")
    plain = plain_request(head + b"\r\n\r\n")
    if plain is None or len(body) > MAX_BODY_BYTES:
        return False
    return incoming_of(plain, body, INFERENCE_PATHS) is not None


def ask(proxy: Proxy, case: Case, extra: str) -> Answer:
    with Wire(("127.0.0.1", proxy.port)) as wire:
        return wire.send(case.request(extra)).read_answer(head_only=case.method == "HEAD")


def said(answer: Answer) -> tuple[int, list[tuple[str, str]], Any]:
    """Return all of an answer but what differs each time it is asked for."""
    headers = [(name.lower(), value) for name, value in answer.headers]
    changing = {"date"}
    if answer.header("x-smartproxy-error") or answer.status >= 400:
        return answer.status, sorted(h for h in headers if h[0] not in changing), answer.body
    changing.add("content-length")
    kept = sorted(h for h in headers if h[0] not in changing)
    try:
        body = answer.json()
    except ValueError:
        return answer.status, kept, answer.body.count(b"data: ")
    return (
        answer.status,
        kept,
        sorted(body),
    )
