"""The routes: what each answers, in llama-server's shapes; no sockets, no process matters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fakes.stand_in import answers
from tests.support.fakes.stand_in.engine import Engine, Slot
from tests.support.fakes.stand_in.http import JSON, Connection, Gone, Request, dump, error_body
from tests.support.fakes.stand_in.journal import Journal
from tests.support.fakes.stand_in.knobs import KnobError, Knobs, for_request

BROKEN_ANSWERS = {
    "early": b"",
    "garbage": b"\x00\x01 this is no HTTP\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
}
BROKEN_STREAMS = {"cut": b"", "chunk": b"zz\r\nno size\r\n"}
PUBLIC = frozenset({"/health", "/v1/health", "/models", "/v1/models"})
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says and the routes must know."""

    alias: str
    model_path: str
    api_keys: frozenset[str]
    metrics: bool
    slots: bool
    embedding: bool
    reranking: bool


class Api:
    """Answers requests; `crash` ends the process, `request_memory` takes or gives GPU memory."""

    def __init__(self, settings: Settings, engine: Engine, knobs: Knobs, journal: Journal) -> None:
        self.settings = settings
        self.engine = engine
        self.knobs = knobs
        self.journal = journal
        self.ready = threading.Event()
        self.crash: Callable[[], None] = lambda: None
        self.request_memory: Callable[[int], None] = lambda requests: None
        self._inferences = 0
        self._lock = threading.Lock()

    def handle(self, connection: Connection, request: Request) -> None:
        """Answer one request; raises Gone and engine.Stopping."""
        self.journal.write_request(request.method, request.target, request.headers, request.body)
        if not self.ready.is_set():
            connection.answer_json(503, LOADING)
        elif not self._allowed(request):
            connection.answer_json(401, error_body(401, "Invalid API Key"))
        elif request.method == "OPTIONS":
            methods = "Access-Control-Allow-Methods: GET, POST, DELETE, OPTIONS\r\n"
            allow = methods + "Access-Control-Allow-Headers: *\r\n"
            connection.answer(200, "text/html", b"", allow)
        elif request.method in ("GET", "HEAD"):
            self._get(connection, request)
        elif request.method == "POST" and request.path in _INFERENCE:
            self._infer(connection, request)
        elif request.method == "POST" and request.path in _HELPERS:
            self._help(connection, request)
        else:
            connection.answer_json(404, error_body(404, "File Not Found"))

    def _allowed(self, request: Request) -> bool:
        keys = self.settings.api_keys
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = given or request.headers.get("x-api-key", "")
        return not keys or given in keys or request.path in PUBLIC or request.method == "OPTIONS"

    # --- looking ---------------------------------------------------------------------------------

    def _get(self, connection: Connection, request: Request) -> None:
        settings, path = self.settings, request.path
        if path in ("/health", "/v1/health"):
            if self.knobs.no_health:
                self.engine.hang(connection.gone)
            connection.answer_json(200, {"status": "ok"})
        elif path == "/metrics" and settings.metrics:
            text = self.engine.metrics_text().encode()
            connection.answer(200, "text/plain; version=0.0.4", text)
        elif path == "/slots" and settings.slots:
            self._slots(connection, request)
        elif path in ("/metrics", "/slots"):
            message = f"This server does not support {path[1:]} endpoint. Start it with `-{path}`"
            connection.answer_json(501, error_body(501, message.replace("-/", "--")))
        elif path == "/props":
            connection.answer_json(
                200, answers.props(settings.alias, settings.model_path, self.engine)
            )
        elif path in ("/v1/models", "/models"):
            connection.answer_json(200, answers.models(settings.alias, self.engine))
        else:
            connection.answer_json(404, error_body(404, "File Not Found"))

    def _slots(self, connection: Connection, request: Request) -> None:
        slots = [slot.as_json() for slot in self.engine.slots]
        if "fail_on_no_slot=1" in request.target and all(slot["is_processing"] for slot in slots):
            connection.answer_json(503, error_body(503, "no slot available"))
            return
        connection.answer(200, JSON, dump(slots))

    def _help(self, connection: Connection, request: Request) -> None:
        body = _parse_body(connection, request)
        if body is None:
            return
        if request.path == "/tokenize":
            answer: dict[str, object] = {"tokens": list(str(body.get("content", "")).encode())}
        elif request.path == "/detokenize":
            tokens = bytes(token % 256 for token in body.get("tokens", []))
            answer = {"content": tokens.decode("utf-8", "replace")}
        else:
            answer = {"prompt": answers.prompt_text(body)}
        connection.answer_json(200, answer)

    # --- inference -------------------------------------------------------------------------------

    def _infer(self, connection: Connection, request: Request) -> None:
        body = _parse_body(connection, request)
        if body is None:
            return
        kind = _INFERENCE[request.path]
        try:
            knobs = for_request(self.knobs, body.get("fake"))
        except KnobError as error:
            return connection.answer_json(400, error_body(400, str(error)))
        refusal = self._refusal(kind, body, knobs)
        if refusal is not None:
            return connection.answer_json(*refusal)
        self._maybe_crash(knobs)
        if knobs.broken in BROKEN_ANSWERS:
            connection.send(BROKEN_ANSWERS[knobs.broken])
            raise Gone
        slot = self.engine.take_slot(connection.gone)
        try:
            self.request_memory(1)
            slot.prompt_tokens = answers.count_tokens(body)
            slot.max_tokens = _max_tokens(body, knobs, slot)
            slot.stream = bool(body.get("stream"))
            self._generate(connection, kind, (body, slot, knobs))
        finally:
            self.request_memory(-1)
            self.engine.give_back(slot)
        return None

    def _refusal(
        self, kind: str, body: dict[str, Any], knobs: Knobs
    ) -> tuple[int, dict[str, object]] | None:
        if knobs.status:
            return knobs.status, error_body(knobs.status, "stand-in was told to fail")
        if kind == "embedding" and not self.settings.embedding:
            text = "This server does not support embeddings. Start it with `--embeddings`"
            return 501, error_body(501, text)
        if kind == "rerank" and not self.settings.reranking:
            text = "This server does not support reranking. Start it with `--reranking`"
            return 501, error_body(501, text)
        if kind == "chat" and "messages" not in body:
            return 400, error_body(400, "'messages' is required")
        if kind in ("text", "native") and "prompt" not in body:
            text = "[json.exception.out_of_range.403] key 'prompt' not found"
            return 400, error_body(400, text)
        return self._too_long(body)

    def _too_long(self, body: dict[str, Any]) -> tuple[int, dict[str, object]] | None:
        tokens, context = answers.count_tokens(body), self.engine.slots[0].context_size
        if tokens <= context:
            return None
        text = f"request ({tokens} tokens) exceeds the available context size ({context} tokens)"
        more = {"type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": context}
        return 400, error_body(400, f"{text}, try increasing it", **more)

    def _maybe_crash(self, knobs: Knobs) -> None:
        with self._lock:
            self._inferences += 1
            number = self._inferences
        if knobs.crash_on_request and number >= knobs.crash_on_request and knobs.misbehaves():
            self.crash()

    def _generate(
        self, connection: Connection, kind: str, work: tuple[dict[str, Any], Slot, Knobs]
    ) -> None:
        body, slot, knobs = work
        if knobs.hang_on_request and knobs.misbehaves():
            self.engine.hang(connection.gone)
        started = time.time()
        speech = answers.Speech(kind=kind, alias=self.settings.alias, body=body, slot=slot)
        if slot.stream and kind in ("chat", "text", "native"):
            self._stream(connection, speech, knobs)
        else:
            words = []
            for word in self.engine.tokens(slot, knobs, connection.gone):
                words.append(word)
                self._crash_after(len(words), knobs)
            connection.answer_json(200, speech.whole("".join(words)))
        self.journal.write("answered", tokens=slot.decoded, seconds=time.time() - started)

    def _stream(self, connection: Connection, speech: answers.Speech, knobs: Knobs) -> None:
        begun = False
        for count, word in enumerate(
            self.engine.tokens(speech.slot, knobs, connection.gone), start=1
        ):
            try:
                if not begun:
                    connection.start_stream()
                    begun = True
                connection.send_chunk(speech.piece(word, first=count == 1))
            except Gone:
                if not knobs.stick:
                    raise
            if count == knobs.error_mid_stream:
                connection.send_chunk(b"data: " + dump(error_body(500, "told to fail")) + b"\n\n")
                return connection.end_stream()
            if knobs.broken and count == 3:
                connection.send(BROKEN_STREAMS[knobs.broken])
                raise Gone
            self._crash_after(count, knobs)
        if not begun:
            connection.start_stream()
        connection.send_chunk(speech.last())
        connection.send_chunk(b"data: [DONE]\n\n")
        return connection.end_stream()

    def _crash_after(self, count: int, knobs: Knobs) -> None:
        if count == knobs.crash_mid_stream and knobs.misbehaves():
            self.crash()


_INFERENCE = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/completions": "text",
    "/completion": "native",
    "/completions": "native",
    "/infill": "native",
    "/v1/embeddings": "embedding",
    "/embeddings": "embedding",
    "/embedding": "embedding",
    "/v1/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/reranking": "rerank",
    "/reranking": "rerank",
}
_HELPERS = frozenset({"/tokenize", "/detokenize", "/apply-template"})


def model_file_problem(path: str) -> str:
    """Return why llama-server would refuse the file, by its first bytes; "" where it would not."""
    file = Path(path)
    if not file.is_file():
        return f"failed to open GGUF file '{path}' (No such file or directory)"
    with file.open("rb") as handle:
        magic = handle.read(4)
    return "" if magic == b"GGUF" else f"invalid magic characters: '{magic!r}', expected 'GGUF'"


def _parse_body(connection: Connection, request: Request) -> dict[str, Any] | None:
    """Return the JSON object, or answer as these builds do (500) and return None."""
    try:
        body = json.loads(request.body)
    except ValueError as error:
        text = f"[json.exception.parse_error.101] parse error: {error}"
        connection.answer_json(500, error_body(500, text))
        return None
    if not isinstance(body, dict):
        text = "[json.exception.type_error.304] cannot use at() with array"
        connection.answer_json(400, error_body(400, text))
        return None
    return body


def _max_tokens(body: dict[str, Any], knobs: Knobs, slot: Slot) -> int:
    """Return how many tokens to make: as asked, bounded by what is left of the context."""
    left = slot.context_size - slot.prompt_tokens
    for key in ("max_tokens", "max_completion_tokens", "n_predict"):
        if isinstance(body.get(key), int):
            asked = int(body[key])
            return left if asked < 0 else min(asked, left)
    return min(knobs.tokens, left)
