"""JSON in the shapes of llama-server's answers; pure."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from tests.support.fakes.stand_in.engine import Engine, Slot
from tests.support.fakes.stand_in.http import dump

BUILD = "b1-fa4e5e4"
_OBJECTS = {"chat": "chat.completion", "text": "text_completion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """One answer of a chat ("chat"), text ("text") or llama.cpp's own ("native") completion,
    or of an embedding or rerank request."""

    kind: str
    alias: str
    body: dict[str, Any]
    slot: Slot
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str) -> object:
        """Return the answer to a request without `stream`."""
        if self.kind == "embedding":
            return _embeddings(self.body, self.alias)
        if self.kind == "rerank":
            return _ranks(self.body, self.alias)
        if self.kind == "native":
            return self._native_end(text)
        choice: dict[str, object] = {"finish_reason": "length", "index": 0}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": None}
        more = {"usage": self._usage(), "timings": self._timings()}
        return self._frame(_OBJECTS[self.kind], [choice]) | more

    def piece(self, text: str, *, first: bool) -> bytes:
        """Return the event (for the first token of a chat: events) of one token."""
        if self.kind == "native":
            slot = {"id_slot": self.slot.id, "tokens_predicted": self.slot.decoded}
            tokens = {"index": 0, "content": text, "tokens": list(text.encode()), "stop": False}
            return _event(tokens | slot | {"tokens_evaluated": self.slot.prompt_tokens})
        if self.kind == "text":
            return self._chunk({"text": text, "logprobs": None})
        opening = b""
        if first:
            opening = self._chunk({"delta": {"role": "assistant", "content": None}})
        return opening + self._chunk({"delta": {"content": text}})

    def last(self) -> bytes:
        """Return the closing events, before [DONE]."""
        if self.kind == "native":
            return _event(self._native_end(""))
        if self.kind == "text":
            return self._chunk({"text": "", "logprobs": None}, end=True)
        closing = self._chunk({"delta": {}}, end=True)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            more = {"usage": self._usage(), "timings": self._timings()}
            closing += _event(self._frame("chat.completion.chunk", []) | more)
        return closing

    def _chunk(self, choice: dict[str, object], *, end: bool = False) -> bytes:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        whole = {"finish_reason": "length" if end else None, "index": 0} | choice
        frame = self._frame(name, [whole])
        if end and self.kind == "text":
            frame["usage"] = self._usage()
        return _event(frame | ({"timings": self._timings()} if end else {}))

    def _frame(self, name: str, choices: list[dict[str, object]]) -> dict[str, object]:
        frame = {"choices": choices, "created": self.created, "id": self.id, "model": self.alias}
        return frame | {"system_fingerprint": BUILD, "object": name}

    def _usage(self) -> dict[str, object]:
        prompt, made = self.slot.prompt_tokens, self.slot.decoded
        usage = {"completion_tokens": made, "prompt_tokens": prompt, "total_tokens": prompt + made}
        return usage | {"prompt_tokens_details": {"cached_tokens": 0}}

    def _timings(self) -> dict[str, object]:
        counts: dict[str, object] = {"cache_n": 0, "prompt_n": self.slot.prompt_tokens}
        counts["prompt_ms"] = 1.0
        return counts | {"predicted_n": self.slot.decoded, "predicted_ms": 1.0}

    def _native_end(self, text: str) -> dict[str, object]:
        slot = self.slot
        end = {"index": 0, "content": text, "tokens": [], "id_slot": slot.id, "stop": True}
        counts = {"tokens_predicted": slot.decoded, "tokens_evaluated": slot.prompt_tokens}
        settings = {"n_predict": slot.max_tokens, "max_tokens": slot.max_tokens}
        more = {"generation_settings": settings, "prompt": prompt_text(self.body)}
        return end | counts | more | {"model": self.alias, "stop_type": "limit"}


def _event(value: object) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def prompt_text(body: dict[str, Any]) -> str:
    """Return what a request asks, in one string."""
    for key in ("prompt", "content", "input", "query"):
        if key in body:
            return body[key] if isinstance(body[key], str) else json.dumps(body[key])
    lines = (f"{entry.get('role')}: {entry.get('content')}" for entry in body.get("messages", []))
    return "\n".join(lines)


def count_tokens(body: dict[str, Any]) -> int:
    """Return the prompt's tokens: a word is one, and there is always one."""
    return max(1, len(prompt_text(body).split()))


def props(alias: str, model_path: str, engine: Engine) -> dict[str, object]:
    """Return /props."""
    settings = {"params": {"n_predict": -1}, "n_ctx": engine.slots[0].context_size}
    return {
        "default_generation_settings": settings,
        "total_slots": len(engine.slots),
        "model_alias": alias,
        "model_path": model_path,
        "modalities": {"vision": False, "video": False, "audio": False},
        "chat_template": "{{ messages }}",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "build_info": BUILD,
        "is_sleeping": False,
    }


def models(alias: str, engine: Engine) -> dict[str, object]:
    """Return /v1/models."""
    ids = alias.split(",")
    meta = {"vocab_type": 2, "n_vocab": 256, "n_ctx": engine.slots[0].context_size}
    entry: dict[str, object] = {
        "id": ids[0],
        "aliases": ids,
        "tags": [],
        "object": "model",
        "owned_by": "llamacpp",
    }
    entry |= {"created": int(time.time()), "meta": meta | {"n_ctx_train": 8192, "n_embd": 8}}
    return {"models": [{"name": ids[0], "model": ids[0]}], "object": "list", "data": [entry]}


def _embeddings(body: dict[str, Any], alias: str) -> dict[str, object]:
    texts = body.get("input", body.get("content", ""))
    vectors = [_vector(str(text)) for text in (texts if isinstance(texts, list) else [texts])]
    data = [
        {"embedding": vector, "index": index, "object": "embedding"}
        for index, vector in enumerate(vectors)
    ]
    tokens = count_tokens(body)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"model": alias, "object": "list", "usage": usage, "data": data}


def _vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


def _ranks(body: dict[str, Any], alias: str) -> dict[str, object]:
    documents = body.get("documents", [])
    results = [
        {"index": index, "relevance_score": -float(index)} for index in range(len(documents))
    ]
    tokens = count_tokens(body)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"model": alias, "object": "list", "usage": usage, "results": results}
