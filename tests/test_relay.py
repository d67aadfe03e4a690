"""The relay in a real gunicorn worker, against servers that follow a script to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.gunicorns import Gunicorn, gunicorn
from tests.upstreams import Upstream, Visit, chunk, event_head, plain_answer

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    with gunicorn(tmp_path_factory.mktemp("relay")) as started:
        yield started


def test_json_answer_passes_unchanged(proxy: Gunicorn) -> None:
    body = json.dumps({"answer": "x" * 5000}).encode()
    with Upstream(lambda visit: visit.send(plain_answer(body, extra=b"X-Own: 1\r\n"))) as upstream:
        with proxy.connect() as wire:
            sent = json.dumps({"model": str(upstream.port), "n": 1}).encode()
            answer = wire.post("/v1/completions?a=%20b", sent).read_answer()
        assert (answer.status, answer.body) == (200, body)
        assert answer.header("x-own") == "1"
        assert answer.header("connection") == "keep-alive"
        visit = upstream.visit()
        assert visit.body == sent
        assert visit.request_line == b"POST /v1/completions?a=%20b HTTP/1.1"
        assert visit.headers[b"authorization"] == b"Bearer server-key"


def test_event_stream_keeps_chunk_boundaries(proxy: Gunicorn) -> None:
    events = [b"data: %d\n\n" % number for number in range(50)]

    def script(visit: Visit) -> None:
        visit.send(event_head() + b"".join(chunk(event) for event in events) + b"0\r\n\r\n")

    with Upstream(script) as upstream, proxy.connect() as wire:
        answer = wire.post("/v1/completions", {"model": str(upstream.port), "stream": True})
        got = answer.read_answer()
    assert got.body == b"".join(events)
    assert got.chunks == [len(event) for event in events]
