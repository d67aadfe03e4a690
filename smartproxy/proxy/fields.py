"""`model` and `stream` of a request's body, without making Python objects of the rest of it.

A body is the client's word. 62 MB of `{},` were 2 GB of dictionaries and 15 s; 20 MB of empty form
fields were a minute. Here both cost a pass over the bytes, and no memory.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

import msgspec
from werkzeug.http import parse_options_header

from smartproxy.errors import BadRequest, InvalidJson

#: up to this a body may become objects: a wrong `model`, or what only Python's `json` can read
MAX_SMALL_BYTES = 65536
#: of a form; a transcription has about ten
MAX_PARTS = 256
MAX_PART_HEAD_BYTES = 8192
#: RFC 2046 5.1.1
MAX_BOUNDARY_BYTES = 70
#: bytes of text that are decoded at a time, to see whether they are UTF-8
DECODED_BYTES = 1 << 20

BYTE_ORDER_MARK = codecs.BOM_UTF8
#: JSON values by their first byte, as an error calls them
KINDS = {
    **dict.fromkeys(b"-0123456789NI", "a number"),
    **{ord("["): "a list", ord("{"): "an object", ord("t"): "true", ord("f"): "false"},
}

Body = bytes | bytearray


class Fields(msgspec.Struct, frozen=True, gc=False):
    """What a body says to us."""

    #: None: it does not say, or null
    model: str | None = None
    stream: bool = False
    #: what `model` is where it is no text, "a number"
    not_text: str | None = None


class _Wanted(msgspec.Struct, gc=False):
    model: Any = None
    stream: Any = None


class _Unmade(msgspec.Struct, gc=False):
    """As bytes: what names no model could be as large as the body."""

    model: msgspec.Raw = msgspec.Raw(b"null")
    stream: msgspec.Raw = msgspec.Raw(b"null")


_small = msgspec.json.Decoder(_Wanted)
_large = msgspec.json.Decoder(_Unmade)
_text = msgspec.json.Decoder(str)


def json_fields(body: Body) -> Fields:
    """Return what a JSON object says; of a repeated key the last counts, as for llama-server.

    Raises InvalidJson.
    """
    try:
        return _strict(body)
    except msgspec.ValidationError as error:
        raise InvalidJson(f"the body must be a JSON object: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if len(body) > MAX_SMALL_BYTES:
            raise InvalidJson(f"the body is not JSON: {error}") from None
    return _lenient(body)


def _strict(body: Body) -> Fields:
    if not body.isascii():
        _check_utf8(body)
    data = body if body[:3] != BYTE_ORDER_MARK else memoryview(body)[3:]
    if len(body) <= MAX_SMALL_BYTES:
        wanted = _small.decode(data)
        return _fields(wanted.model, wanted.stream is True)
    unmade = _large.decode(data)
    model, streams = bytes(unmade.model), bytes(unmade.stream) == b"true"
    if model[:1] == b'"':
        return Fields(_text.decode(model), streams)
    return Fields(None, streams, KINDS.get(model[0]))


def _fields(model: object, streams: bool) -> Fields:
    if model is None or isinstance(model, str):
        return Fields(model, streams)
    return Fields(None, streams, KINDS[json.dumps(model).encode()[0]])


def _check_utf8(body: Body) -> None:
    """Raise UnicodeDecodeError where a string is none; msgspec skips what it need not return."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with memoryview(body) as view:
        for start in range(0, len(view), DECODED_BYTES):
            decoder.decode(view[start : start + DECODED_BYTES])
    decoder.decode(b"", final=True)


def _lenient(body: Body) -> Fields:
    """Return what Python's own reader finds: NaN, half surrogates, deep nesting."""
    try:
        found: Any = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidJson(f"the body must be a JSON object, got {type(found).__name__}")
    return _fields(found.get("model"), found.get("stream") is True)


def form_fields(content_type: str, body: Body) -> Fields:
    """Return what a multipart form says; of a repeated field the first counts. Raises BadRequest.

    Files are stepped over. RFC 7578, with CRLF as line end.
    """
    boundary = parse_options_header(content_type)[1].get("boundary", "").encode("latin-1")
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise BadRequest("the form's Content-Type must have a boundary of 1 to 70 characters")
    found: dict[str, str] = {}
    mark = b"\r\n--" + boundary
    first = -2 if body.startswith(mark[2:]) else body.find(mark)
    if first == -1:
        raise BadRequest("the form has no part: its boundary is nowhere in the body")
    end = first + len(mark)
    for _ in range(MAX_PARTS):
        if body[end : end + 2] == b"--":
            break
        end, name, start, stop = _part(body, mark, end)
        if name in ("model", "stream"):
            found.setdefault(name, body[start:stop].decode("utf-8", "replace"))
    else:
        raise BadRequest(f"the form has more than {MAX_PARTS} parts")
    return Fields(found.get("model"), found.get("stream") == "true")


def _part(body: Body, mark: bytes, at: int) -> tuple[int, str, int, int]:
    """Return of the part behind a boundary: where the next boundary ends, name, start and stop."""
    head_end = body.find(b"\r\n\r\n", at, at + MAX_PART_HEAD_BYTES)
    if head_end < 0:
        raise BadRequest(
            f"a part of the form has no end of its head within {MAX_PART_HEAD_BYTES} bytes"
        )
    start = head_end + 4
    # a part may be empty: its head's last line end is then the boundary's first
    stop = body.find(mark, start - 2)
    if stop < 0:
        raise BadRequest("the form is cut short: its last part has no boundary behind it")
    name = _name(bytes(body[at:head_end]))
    return stop + len(mark), name, start, max(start, stop)


def _name(head: bytes) -> str:
    """Return the field's name that a part's head has; nothing for a file."""
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            _, parameters = parse_options_header(value.decode("latin-1").strip())
            return "" if "filename" in parameters else parameters.get("name", "")
    return ""
