"""A request's way: whose is it, for which model, and over to the relay.

`relay_any` is the whole of it; everything below says how one of its questions is answered.
"""

from __future__ import annotations

import json
from functools import partial
from io import BytesIO
from typing import Any
from urllib.parse import quote

import orjson
from flask import Blueprint, Response, g, request
from werkzeug.datastructures import Headers
from werkzeug.formparser import FormDataParser

from smartproxy.catalog.catalog import Catalog, ModelSpec
from smartproxy.config.settings import Settings
from smartproxy.errors import (
    InvalidJson,
    ModelNotFound,
    ModelRequired,
    RouteNotFound,
    SmartProxyError,
)
from smartproxy.proxy import auth, own_answers
from smartproxy.proxy.ensure import Broker
from smartproxy.proxy.own_answers import OwnAnswer
from smartproxy.proxy.pages.counting import RequestCounts
from smartproxy.proxy.relay.relay import Job, hand_over
from smartproxy.proxy.wire.heads import header_bytes
from smartproxy.proxy.worker.plain import Express, PlainRequest

INFERENCE_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/completions",
        "/completions",
        "/completion",
        "/v1/embeddings",
        "/embeddings",
        "/v1/rerank",
        "/rerank",
        "/v1/reranking",
        "/reranking",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/v1/audio/transcriptions",
    }
)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
#: what a URL path may carry unquoted, '/' included (RFC 3986 pchar)
PATH_SAFE = "/:@!$&'()*+,;=-._~"


def blueprint(
    settings: Settings, catalog: Catalog, broker: Broker, counting: RequestCounts
) -> Blueprint:
    """Return the catch-all; whatever is registered more exactly wins over it."""
    routes = Blueprint("relay", __name__)
    make_job = partial(_job, settings, counting)

    @routes.after_request
    def count_refused(response: Response) -> Response:
        if response.status_code >= 400 and not g.get("handed_over"):
            counting.add("", str(response.status_code))
        return response

    @routes.route("/", defaults={"path": ""}, methods=METHODS, provide_automatic_options=False)
    @routes.route("/<path:path>", methods=METHODS, provide_automatic_options=False)
    def relay_any(path: str) -> Response:
        if request.method == "OPTIONS" and not path.startswith("upstream/"):
            return as_response(own_answers.preflight(origin()))
        auth.check(request, settings)
        if path.startswith("upstream/"):
            spec, target = upstream_target(catalog, path.removeprefix("upstream/"))
            body, stream = request.get_data(cache=False), False
        else:
            body = request.get_data(cache=False)
            fields = body_fields(body)
            spec = named_model(catalog, "/" + path, fields)
            target = raw_target()
            stream = bool(fields and fields.get("stream") is True)
        job = make_job(
            spec,
            method=request.method,
            target=target,
            headers=header_bytes(request.headers.items()),
            body=body,
            stream=stream,
        )
        g.handed_over = True
        return hand_over(request.environ, job, broker)

    return routes


def express(
    settings: Settings, catalog: Catalog, broker: Broker, counting: RequestCounts
) -> Express:
    """Return the short way of inference requests: what `relay_any` does where nothing is odd."""
    max_body_bytes = settings.max_body_mb << 20
    make_job = partial(_job, settings, counting)

    def decide(plain: PlainRequest, body: bytes) -> Job | None:
        path = plain.path.decode("latin-1")
        if path not in INFERENCE_PATHS or len(body) > max_body_bytes:
            return None
        if plain.fields.get(b"content-type", b"").lower().startswith(b"multipart/"):
            return None
        try:
            fields = orjson.loads(body)
            if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
                return None
            key = auth.presented_key(lambda name, _: plain.field(name.lower().encode()))
            auth.check_key(path, key, settings)
            spec = catalog.resolve(fields["model"])
        except (SmartProxyError, orjson.JSONDecodeError):
            return None  # relay_any says no in full
        return make_job(
            spec,
            method="POST",
            target=plain.target.decode("latin-1"),
            headers=plain.headers,
            body=body,
            stream=fields.get("stream") is True,
        )

    return Express(broker=broker, decide=decide)


def _job(settings: Settings, counting: RequestCounts, spec: ModelSpec, **request: Any) -> Job:
    return Job(
        model_id=spec.id,
        request_timeout_s=settings.request_timeout,
        sse_wait_comment_after_s=settings.sse_wait_comment_after,
        on_settled=counting.settled,
        **request,
    )


def body_fields(body: bytes) -> dict[str, Any] | None:
    """Return the fields that name model and stream; None when the body has none to offer.

    Raises InvalidJson for a body of an inference route that is neither JSON nor a form.
    """
    content_type = request.mimetype
    if content_type == "multipart/form-data":
        _, form, _ = FormDataParser().parse(
            BytesIO(body), content_type, len(body), request.mimetype_params
        )
        return {**form.to_dict(), "stream": form.get("stream") == "true"}
    inference = request.path in INFERENCE_PATHS and request.method == "POST"
    if not body and not inference:
        return None
    try:
        fields = parsed(body)
    except (ValueError, RecursionError) as error:
        if inference:
            raise InvalidJson(f"the body is not JSON: {error}") from None
        return None
    if not isinstance(fields, dict):
        if inference:
            raise InvalidJson(f"the body wants a JSON object, got {type(fields).__name__}")
        return None
    return fields


def parsed(body: bytes) -> Any:
    """Return JSON of any depth; orjson is several times faster but stricter than llama-server."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body.decode("utf-8-sig"))


def named_model(catalog: Catalog, path: str, fields: dict[str, Any] | None) -> ModelSpec:
    """Return the model a request is for.

    A path we don't know is relayed only if it names a model we do know: llama-server gains routes.
    Raises ModelRequired, ModelNotFound or RouteNotFound.
    """
    name = (fields or {}).get("model") or request.args.get("model")
    inference = path in INFERENCE_PATHS and request.method == "POST"
    if inference:
        if name is None or name == "":
            if catalog.default is None:
                raise ModelRequired(
                    "the request names no model and no default_model is configured;"
                    " GET /v1/models lists those there are"
                )
            return catalog.models[catalog.default]
        if not isinstance(name, str):
            raise ModelRequired(f"`model` wants a string, got {type(name).__name__}")
        return catalog.resolve(name)
    if isinstance(name, str) and name:
        try:
            return catalog.resolve(name)
        except ModelNotFound:
            pass
    raise RouteNotFound(f"no route {request.method} {path}; see /openapi.json")


def upstream_target(catalog: Catalog, rest: str) -> tuple[ModelSpec, str]:
    """Split `<model>/<path>` at the longest known id; returns what to send to its server."""
    found = catalog.split_path(rest)
    if found is None:
        raise ModelNotFound(f"no model's id starts '{rest[:200]}'; GET /v1/models lists them")
    spec, path = found
    query = request.query_string.decode("latin-1")
    return spec, "/" + quote(path, safe=PATH_SAFE) + (f"?{query}" if query else "")


def raw_target() -> str:
    """Return path and query as the client sent them."""
    raw: str = request.environ.get("RAW_URI") or request.full_path.rstrip("?")
    if raw.startswith("/"):
        return raw
    query = request.query_string.decode("latin-1")  # absolute form: only a proxy's client sends it
    return quote(request.path, safe=PATH_SAFE) + (f"?{query}" if query else "")


def origin() -> bytes:
    """Return the origin of the page that asks, or nothing."""
    return request.headers.get("Origin", "").encode("latin-1")


def as_response(answer: OwnAnswer) -> Response:
    """Return an answer of our own as Flask's."""
    response = Response(answer.body, status=answer.status)
    response.headers = Headers(
        [(name.decode(), value.decode("latin-1")) for name, value in answer.headers]
    )
    response.content_length = len(answer.body)
    return response
