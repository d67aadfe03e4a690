"""Answers of our own: their status, headers and body, built once for every way out.

The relay, Flask and the worker's loop send them, each in its own manner. Without one place a
browser could read a refusal of Flask's and not the same refusal of the relay's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus

import orjson

from smartproxy.errors import SmartProxyError, openai_body
from smartproxy.proxy.wire.heads import AnswerHead, Framing

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAnswer:
    """A whole answer. `headers` has all but what belongs to one connection (date, framing)."""

    status: int
    headers: Headers
    body: bytes

    @property
    def head(self) -> AnswerHead:
        """Return the head for a connection of ours."""
        return AnswerHead(
            status=self.status,
            reason=HTTPStatus(self.status).phrase.encode(),
            headers=(*self.headers, (b"Content-Length", b"%d" % len(self.body))),
            framing=Framing.LENGTH,
            length_bytes=len(self.body),
        )


def cross_origin(reader: bytes) -> Headers:
    """Return what lets pages read an answer. reader: their origin, `*`, or nothing for nobody."""
    if not reader:
        return ()
    return ((b"Access-Control-Allow-Origin", reader), (b"Vary", b"Origin"))


def opened(head: AnswerHead, reader: bytes) -> AnswerHead:
    """Return a server's head with what lets pages read the answer."""
    if not reader:
        return head
    return replace(head, headers=(*head.headers, *cross_origin(reader)))


def error_answer(error: SmartProxyError, reader: bytes, *, status: int | None = None) -> OwnAnswer:
    """Return an error in OpenAI's shape; its X-Smartproxy-Error tells ours from a server's.

    status: where it is another than the error's.
    """
    headers = [
        (b"Content-Type", b"application/json"),
        (b"X-Smartproxy-Error", error.code.encode()),
        *cross_origin(reader),
    ]
    if error.retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % error.retry_after_s))
    return OwnAnswer(
        status=status or error.http_status,
        headers=tuple(headers),
        body=orjson.dumps(openai_body(error)),
    )


def json_answer(body: object) -> OwnAnswer:
    """Return an answer of JSON, with sorted keys as Flask's are."""
    return OwnAnswer(
        status=200,
        headers=((b"Content-Type", b"application/json"),),
        body=orjson.dumps(body, option=orjson.OPT_SORT_KEYS) + b"\n",
    )


def event_stream_head(reader: bytes) -> AnswerHead:
    """Return the head of a stream that begins before its server has answered."""
    return AnswerHead(
        status=200,
        reason=b"OK",
        headers=(
            (b"Content-Type", b"text/event-stream"),
            (b"Cache-Control", b"no-cache"),
            *cross_origin(reader),
        ),
        framing=Framing.CHUNKED,
        is_event_stream=True,
    )


def preflight(reader: bytes) -> OwnAnswer:
    """Answer a browser's CORS preflight, which never carries a body or a key.

    No credentials: those a browser would add by itself are a front server's, not ours. `*` does not
    cover Authorization, so it is named.
    """
    allowed: Headers = ()
    if reader:
        allowed = (
            *cross_origin(reader),
            (b"Access-Control-Allow-Methods", b"GET, POST, PUT, PATCH, DELETE, OPTIONS"),
            (b"Access-Control-Allow-Headers", b"*, Authorization"),
            (b"Access-Control-Allow-Private-Network", b"true"),
        )
    return OwnAnswer(
        status=200, headers=((b"Content-Type", b"text/html; charset=utf-8"), *allowed), body=b""
    )
