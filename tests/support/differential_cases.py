"""The requests that test_differential sends twice: to a llama-server, and through the proxy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.support.wire import PAGE

MODEL = "smollm2-135m"
JSON_TYPE = ("Content-Type", "application/json")
ORIGIN = ("Origin", PAGE)
SAY_HI = [{"role": "system", "content": "."}, {"role": "user", "content": "hi"}]
SMILES = 'naïve 東京 🦙 \u2028 \x00 \\ " ß'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
        },
    },
}
COLOUR_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    target: str
    #: sent as JSON, bytes as they are
    body: Any = b""
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()
    #: send the body in pieces, with `Transfer-Encoding: chunked`
    chunked: bool = False
    #: what the llama-server is asked for; the same target unless it is said here
    direct_target: str | None = None

    def request(self, target: str, *more: tuple[str, str]) -> bytes:
        """Return the whole request as bytes."""
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        lines = [("Host", "127.0.0.1"), *self.headers, *more]
        if not isinstance(self.body, bytes):
            lines.append(JSON_TYPE)
        if self.chunked:
            lines.append(("Transfer-Encoding", "chunked"))
            third = len(body) // 3 + 1
            pieces = [body[at : at + third] for at in range(0, len(body), third)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
        elif body or self.method in ("POST", "PUT"):
            lines.append(("Content-Length", str(len(body))))
        head = f"{self.method} {target} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines)
        return head.encode("latin-1") + b"\r\n" + body


def post(name: str, target: str, **body: Any) -> Case:
    return Case(name=name, target=target, body={"model": MODEL, **body})


def generate(name: str, target: str, **body: Any) -> Case:
    """A request for text: always the same text, in a slot that remembers nothing."""
    fixed: dict[str, Any] = {"temperature": 0, "seed": 1, "cache_prompt": False, "id_slot": 0}
    length = "n_predict" if target in ("/completion", "/infill") else "max_tokens"
    return post(name, target, **{**fixed, length: 3, **body})


def chat(name: str, **body: Any) -> Case:
    return generate(name, "/v1/chat/completions", **{"messages": SAY_HI, **body})


def complete(name: str, **body: Any) -> Case:
    return generate(name, "/v1/completions", **{"prompt": "One two", **body})


def native(name: str, **body: Any) -> Case:
    return generate(name, "/completion", **{"prompt": "One two", **body})


def upstream(name: str, path: str, **more: Any) -> Case:
    return Case(name=name, target=f"/upstream/{MODEL}{path}", direct_target=path, **more)


def raw(name: str, target: str, body: bytes, *headers: tuple[str, str], **more: Any) -> Case:
    return Case(name=name, target=target, body=body, headers=headers, **more)


SHORT = json.dumps({"model": MODEL, "content": "hello there"}).encode()
PADDED = json.dumps({"model": MODEL, "content": "hi", "padding": "x" * (2 << 20)}).encode()
FORM_TYPE = ("Content-Type", "application/x-www-form-urlencoded")

CHATS = [
    chat("chat"),
    chat("chat, streaming", stream=True),
    chat("chat, streaming with usage", stream=True, stream_options={"include_usage": True}),
    generate("chat without /v1", "/chat/completions", messages=SAY_HI),
    chat("JSON schema", response_format={"type": "json_schema", "json_schema": {
        "name": "c", "schema": COLOUR_SCHEMA}}, max_tokens=12),
    chat("JSON object, streaming", response_format={"type": "json_object"}, stream=True),
    chat("tools, streaming", tools=[WEATHER], tool_choice="required", stream=True, max_tokens=24),
    chat("tools, cut short", tools=[WEATHER], max_tokens=2),
    chat("logprobs", logprobs=True, top_logprobs=2),
    chat("logprobs, streaming", logprobs=True, top_logprobs=2, stream=True),
    chat("stop strings", stop=["e", "\n"]),
    chat("two choices", n=2, id_slot=-1),
    chat("unicode", messages=[{"role": "system", "content": "."},
                              {"role": "user", "content": SMILES}]),
    chat("parts of content", messages=[{"role": "user", "content": [
        {"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "a"}]),
    chat("ignored fields", user="me", metadata={"a": [1, None]}, service_tier="auto", zzz={}),
    chat("picture for a model without eyes", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]),
]  # fmt: skip

TEXTS = [
    complete("completion"),
    complete("completion, streaming", stream=True),
    complete("completion with echo, logprobs and n", logprobs=2, echo=True, n=1),
    complete("completion of several prompts", prompt=["One", "Two"], id_slot=-1, max_tokens=1),
    complete("completion of tokens", prompt=[504, 1015]),
    complete("huge max_tokens, ended by a stop string", max_tokens=1_000_000, stop=[" "]),
    complete("max_tokens 0", max_tokens=0),
    generate("completions without /v1", "/completions", prompt="One two"),
    native("native completion with n_probs", n_probs=3),
    native("native completion, streaming", stream=True),
    native("native completion with n_probs, streaming", n_probs=2, stream=True),
    native("grammar", grammar='root ::= "yes" | "no"', n_predict=4),
    native("grammar, streaming", grammar='root ::= "maybe"', n_predict=6, stream=True),
    native("native JSON schema", json_schema=COLOUR_SCHEMA, n_predict=12),
    native("chosen fields", return_tokens=True, response_fields=["content", "tokens"]),
    native("logit bias", logit_bias=[[504, False]], timings_per_token=True, stream=True),
    generate("infill", "/infill", input_prefix="def f(", input_suffix="):", prompt=""),
    generate("messages", "/v1/messages", messages=SAY_HI[1:], system="."),
    generate("messages, streaming", "/v1/messages", messages=SAY_HI[1:], system=".", stream=True),
    post("count of tokens", "/v1/messages/count_tokens", messages=SAY_HI[1:], system="."),
    generate("responses", "/v1/responses", input="hi", instructions=".", max_output_tokens=3),
    generate("responses, streaming", "/v1/responses", input="hi", instructions=".",
             max_output_tokens=3, stream=True),
]  # fmt: skip

WORDS = [
    post("tokenize", "/tokenize", content=SMILES, with_pieces=True, add_special=True),
    post("tokenize a large text", "/tokenize", content="The quick brown llama. " * 4000),
    post("detokenize", "/detokenize", tokens=[504, 1015, 19999]),
    post("apply-template", "/apply-template", messages=SAY_HI),
    raw("2 MB body", "/tokenize", PADDED, JSON_TYPE),
    raw("2 MB body, chunked", "/tokenize", PADDED, JSON_TYPE, chunked=True),
    raw("chunked upload", "/tokenize", SHORT, JSON_TYPE, chunked=True),
    raw("curl's content type", "/tokenize", SHORT, FORM_TYPE),
    raw("no content type", "/tokenize", SHORT),
    raw("accepting gzip", "/tokenize", SHORT, JSON_TYPE, ("Accept-Encoding", "gzip, br")),
    raw("expecting 100-continue", "/tokenize", SHORT, JSON_TYPE, ("Expect", "100-continue")),
    raw("from a page elsewhere", "/tokenize", SHORT, JSON_TYPE, ORIGIN),
    raw("model twice", "/tokenize", b'{"model": "x", ' + SHORT[1:], JSON_TYPE),
]

FAULTS = [
    post("embeddings of a model without", "/v1/embeddings", input="hi"),
    post("embeddings without /v1", "/embeddings", input=["hi", "ho"]),
    post("rerank", "/v1/rerank", query="a", documents=["b"]),
    chat("messages of a wrong type", messages="hi"),
    chat("no messages", messages=None),
    chat("unknown role", messages=[{"role": 7, "content": "hi"}]),
    chat("temperature of a wrong type", temperature="hot"),
    chat("stream asked for by a bad request", messages=17, stream=True),
    chat("impossible response format", response_format={"type": "poem"}),
    chat("tools of a wrong type", tools={"a": 1}),
    complete("no prompt", prompt=None),
    native("bad grammar", grammar="root ::= ("),
    complete("prompt beyond the context", prompt=[504] * 9000),
    complete("prompt beyond the context, streaming", prompt=[504] * 9000, stream=True),
    post("tokens of a wrong type", "/detokenize", tokens="x"),
    post("route that only names a model", "/v1/nothing/here"),
    Case(name="wrong method", method="PUT", target=f"/tokenize?model={MODEL}", body=SHORT),
    Case(name="GET of a POST route", method="GET", target=f"/v1/completions?model={MODEL}"),
]

UPSTREAM = [
    upstream("upstream props", "/props", method="GET"),
    upstream("upstream slots", "/slots", method="GET"),
    upstream("upstream slots with a query", "/slots?fail_on_no_slot=1&a=%20b", method="GET"),
    upstream("upstream health", "/health", method="GET"),
    upstream("upstream models", "/v1/models", method="GET"),
    upstream("upstream HEAD", "/health", method="HEAD"),
    upstream("upstream HEAD of nothing", "/nope", method="HEAD"),
    upstream("upstream nothing", "/n%C3%B6pe/a%20b", method="GET"),
    upstream("upstream DELETE", "/props", method="DELETE"),
    upstream("upstream bad JSON", "/tokenize", body=b"{", headers=(JSON_TYPE,)),
    upstream("upstream chat, streaming", "/v1/chat/completions", body={
        "messages": SAY_HI, "temperature": 0, "max_tokens": 2, "cache_prompt": False,
        "id_slot": 0, "stream": True}),
    upstream("upstream page", "/", method="GET"),
    Case(name="props by query", method="GET", target=f"/props?model={MODEL}"),
    Case(name="adapters by query", method="GET", target=f"/lora-adapters?model={MODEL}"),
]  # fmt: skip

CASES = [*CHATS, *TEXTS, *WORDS, *FAULTS, *UPSTREAM]
