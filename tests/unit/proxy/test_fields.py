"""`model` and `stream` found in bodies: as Python's own readers find them, and at bounded cost."""

from __future__ import annotations

import json
import tracemalloc
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.formparser import FormDataParser

from smartproxy.errors import BadRequest, InvalidJson
from smartproxy.proxy.fields import MAX_PARTS, MAX_SMALL_BYTES, Fields, form_fields, json_fields

FORM = "multipart/form-data; boundary=b"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
KEYS = st.sampled_from(["model", "stream", "x"]) | st.text(max_size=3)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """Return JSON of an object, its keys repeated, escaped and spaced in any manner."""
    pairs = []
    for key, value in draw(st.lists(st.tuples(KEYS, VALUES), max_size=6)):
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in key)
        name = f'"{escaped}"' if draw(st.booleans()) else json.dumps(key)
        space = draw(st.sampled_from(["", " ", "\r\n\t"]))
        ascii_only = draw(st.booleans())
        pairs.append(f"{space}{name}{space}:{space}{json.dumps(value, ensure_ascii=ascii_only)}")
    return ("{" + ",".join(pairs) + "}").encode("utf-8", "surrogatepass")


@st.composite
def nearly_json(draw: st.DrawFn) -> bytes:
    """Return JSON with a piece of it replaced, repeated or taken away."""
    data = bytearray(draw(objects()))
    at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 4))
    data[at : at + length] = draw(
        st.sampled_from(
            [b"", b",", b"}", b'"', b"\\", b"\xff", b"1", b"nul", b"\x00", b"[", b"NaN"]
        )
    )
    return bytes(data)


def expected(body: bytes) -> Fields | None:
    """Return what `json` finds; None: no JSON object."""
    try:
        found: Any = json.loads(body.decode("utf-8-sig"))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    model = found.get("model")
    streams = found.get("stream") is True
    return Fields(model if isinstance(model, str) else None, streams)


def found(body: bytes | bytearray) -> Fields | None:
    try:
        fields = json_fields(body)
    except InvalidJson:
        return None
    return Fields(fields.model, fields.stream)


@given(body=objects() | nearly_json())
def test_fields_are_those_that_json_finds(body: bytes) -> None:
    assert found(body) == expected(body)
    assert found(bytearray(body)) == expected(body)


@given(body=objects() | nearly_json())
def test_a_large_body_says_the_same(body: bytes) -> None:
    """White space around it makes it too large for objects; what only `json` reads is refused."""
    large = b" " * (MAX_SMALL_BYTES + 1) + body
    assert found(large) in (expected(body), None)
    try:
        strict = json.loads(body, parse_constant=lambda _: 1 / 0)
        json.dumps(strict, ensure_ascii=False).encode()  # no half surrogates
    except (ValueError, ZeroDivisionError):
        return
    assert found(large) == expected(body)


@pytest.mark.parametrize("pad", [0, MAX_SMALL_BYTES])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"7", "a number"),
        (b"-1", "a number"),
        (b"true", "true"),
        (b"[1]", "a list"),
        (b"{}", "an object"),
        (b"null", None),
        (b'"x"', None),
    ],
)
def test_a_model_that_is_no_text_is_named(value: bytes, kind: str | None, pad: int) -> None:
    assert json_fields(b'{"model": %b}' % value + b" " * pad).not_text == kind


@pytest.mark.parametrize("body", [b"", b"[]", b'"m"', b"null", b"{", b'{"model": "\xff"}', b"\xff"])
@pytest.mark.parametrize("pad", [0, MAX_SMALL_BYTES])
def test_what_is_no_json_object_is_refused(body: bytes, pad: int) -> None:
    with pytest.raises(InvalidJson):
        json_fields(b" " * pad + body)


def test_a_byte_order_mark_is_stepped_over() -> None:
    for pad in (0, MAX_SMALL_BYTES):
        assert json_fields(b'\xef\xbb\xbf{"model": "m"}' + b" " * pad).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "x": [' + b"{}," * (4 << 20) + b"{}]}",
        b'{"x": [' + b"{}," * (4 << 20) + b'{}], "model": 1e999, "y": NaN}',
        b'{"model": [' + b"[]," * (4 << 20) + b"1]}",
        b'{"model": "m", "x": "' + b"\xc3\xa9" * (6 << 20) + b'"}',
    ],
    ids=["objects", "nan", "model", "letters"],
)
def test_a_large_body_makes_no_objects(body: bytes) -> None:
    tracemalloc.start()
    try:
        found(body)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()


def part(name: str, value: bytes, extra: str = "") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + value + b"\r\n"


NAMES = st.sampled_from(["model", "stream", "file", "temperature"])
PARTS = st.lists(st.tuples(NAMES, st.binary(max_size=30), st.booleans()), max_size=6)


@given(parts=PARTS, preamble=st.sampled_from([b"", b"pre\r\n", b"\r\n"]))
def test_fields_of_a_form_are_those_that_werkzeug_finds(
    parts: list[tuple[str, bytes, bool]], preamble: bytes
) -> None:
    pieces = [part(name, value, '; filename="f"' * is_file) for name, value, is_file in parts]
    body = preamble + b"".join(pieces) + b"--b--\r\n"
    if not parts or b"--b" in b"".join(value for _, value, _ in parts):
        return  # an empty form is nothing to werkzeug, and an error to nobody
    _, form, files = FormDataParser().parse(
        BytesIO(body), "multipart/form-data", len(body), {"boundary": "b"}
    )
    for _, file in files.items(multi=True):
        file.close()
    fields = form_fields(FORM, body)
    assert fields.model == form.get("model")
    assert fields.stream == (form.get("stream") == "true")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        b"--b\r\nnope",
        b"--b\r\n\r\nvalue",
        part("model", b"m"),
        b'--b\r\nContent-Disposition: form-data; name="' + b"x" * 9000 + b'"\r\n\r\nm\r\n--b--',
        part("x", b"") * (MAX_PARTS + 1) + b"--b--",
    ],
)
def test_a_broken_form_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        form_fields(FORM, body)


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", f"{FORM}{'x' * 100}"],
)
def test_a_form_without_a_usable_boundary_is_refused(content_type: str) -> None:
    with pytest.raises(BadRequest):
        form_fields(content_type, part("model", b"m") + b"--b--")


def test_a_form_of_a_million_parts_is_given_up_early() -> None:
    body = part("x", b"") * 1_000_000
    with pytest.raises(BadRequest, match="more than 256 parts"):
        form_fields(FORM, body)
