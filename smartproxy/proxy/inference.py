"""What becomes of a request that is not for a page of ours: a job for the relay, or an error.

`job_for` is the only place that decides. The worker's plain way and Flask's route each describe the
request as an `Incoming` and call it. Nothing here knows who carries the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote

from smartproxy.catalog.catalog import Catalog, ModelSpec
from smartproxy.catalog.live import Configuration
from smartproxy.config.settings import Settings
from smartproxy.errors import (
    InvalidJson,
    ModelNotFound,
    ModelRequired,
    RequestTooLarge,
    RouteNotFound,
)
from smartproxy.proxy import auth
from smartproxy.proxy.auth import Role
from smartproxy.proxy.browsers import Browsers
from smartproxy.proxy.fields import Body, Fields, form_fields, json_fields
from smartproxy.proxy.permits import permit_of
from smartproxy.proxy.relay.upstream import Job
from smartproxy.proxy.wire.heads import header

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
UPSTREAM_PREFIX = "/upstream/"
#: a worker's WSGI environment has the whole body here; `wsgi.input` gives copies of it
BODY_KEY = "smartproxy.body"
#: what a URL path may carry unquoted, '/' included (RFC 3986 pchar)
PATH_SAFE = "/:@!$&'()*+,;=-._~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request, complete, whoever read it."""

    method: str
    #: without query, percent signs decoded
    path: str
    #: path and query as the client sent them
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    #: the same by lower-case name
    fields: Mapping[bytes, bytes]
    body: Body
    #: it came on a unix socket: a front server looked at its Host, or has only one name
    behind_front: bool

    @property
    def for_inference(self) -> bool:
        """Whether its path is one of those that always are for a model."""
        return self.method == "POST" and self.path in INFERENCE_PATHS

    @property
    def query(self) -> str:
        """Return what follows the question mark, as sent."""
        return self.target.partition("#")[0].partition("?")[2]

    def field(self, name: str, default: str = "") -> str:
        """Return a header's value."""
        return self.fields.get(name.lower().encode(), b"").decode("latin-1") or default


def job_for(
    incoming: Incoming,
    configuration: Configuration,
    browsers: Browsers,
    *,
    on_settled: Callable[[str, int | None], None] | None,
) -> Job:
    """Return what the relay is to do for a request.

    Raises HostNotAllowed, OriginNotAllowed, RequestTooLarge, InvalidApiKey, InvalidJson,
    BadRequest, ModelRequired, ModelNotFound, ModelNotAllowed or RouteNotFound.
    """
    settings, catalog = configuration.settings, configuration.catalog
    role = check_head(incoming, len(incoming.body), settings, browsers)
    fields = Fields()
    if incoming.path.startswith(UPSTREAM_PREFIX):
        spec, target = upstream_target(catalog, incoming)
    else:
        fields = body_fields(incoming)
        spec, target = named_model(catalog, incoming, fields), incoming.target
    if not incoming.for_inference and changes_server(incoming.method, target):
        auth.require(Role.ADMIN, incoming.field, settings)
    key = auth.named_key(incoming.field, settings)
    auth.check_model(key, spec.id, catalog)
    return Job(
        model_id=spec.id,
        method=incoming.method,
        target=target,
        headers=incoming.headers,
        body=incoming.body,
        stream=fields.stream,
        request_timeout_s=settings.request_timeout,
        sse_wait_comment_after_s=settings.sse_wait_comment_after,
        on_settled=on_settled,
        discreet=role < Role.ADMIN,
        reader=browsers.reader(incoming.field("Origin"), incoming.path),
        permit=permit_of(key),
    )


def changes_server(method: str, target: str) -> bool:
    """Return whether a request changes its server for everybody. target: as the server gets it."""
    path, _, query = target.partition("#")[0].partition("?")
    return auth.changes_server(method, unquote(path), unquote(query))


def check_head(
    incoming: Incoming, length_bytes: int, settings: Settings, browsers: Browsers
) -> auth.Role:
    """Return who asks; raises what can be said of a request before its body is read.

    length_bytes: of the body, as far as the head tells it. Raises HostNotAllowed, OriginNotAllowed,
    RequestTooLarge or InvalidApiKey.
    """
    browsers.check(incoming.method, incoming.path, incoming.field, trust_host=incoming.behind_front)
    check_size(length_bytes, settings)
    return auth.check_key(incoming.path, incoming.field, settings)


def check_size(body_bytes: int, settings: Settings) -> None:
    """Raise RequestTooLarge for a body over the limit."""
    if body_bytes > settings.max_body_mb << 20:
        raise RequestTooLarge(f"the body is larger than {settings.max_body_mb} MB (max_body_mb)")


def body_fields(incoming: Incoming) -> Fields:
    """Return what a request's body says; nothing where it need not say anything.

    Raises InvalidJson for a body of an inference route that is neither JSON nor a form, and
    BadRequest for a broken form.
    """
    content_type = header(incoming.headers, b"content-type")
    if content_type[:19].lower() == b"multipart/form-data":
        return form_fields(content_type.decode("latin-1"), incoming.body)
    if incoming.for_inference:
        return json_fields(incoming.body)
    try:
        return json_fields(incoming.body) if incoming.body else Fields()
    except InvalidJson:
        return Fields()


def named_model(catalog: Catalog, incoming: Incoming, fields: Fields) -> ModelSpec:
    """Return the model a request is for.

    A path we don't know is relayed only if it names a model we do know: llama-server gains routes.
    Raises ModelRequired, ModelNotFound or RouteNotFound.
    """
    name = fields.model or query_model(incoming.query)
    if incoming.for_inference:
        if fields.not_text:
            raise ModelRequired(f"`model` must be text, got {fields.not_text}")
        if not name:
            if catalog.default is None:
                raise ModelRequired(
                    "the request names no model and no default_model is configured;"
                    " GET /v1/models lists those there are"
                )
            return catalog.models[catalog.default]
        return catalog.resolve(name)
    if name:
        try:
            return catalog.resolve(name)
        except ModelNotFound:
            pass
    raise RouteNotFound(f"no route {incoming.method} {incoming.path}; see /openapi.json")


def query_model(query: str) -> str | None:
    """Return what `?model=` says, or None."""
    if "model" not in query:
        return None
    return next((value for key, value in parse_qsl(query) if key == "model"), None)


def upstream_target(catalog: Catalog, incoming: Incoming) -> tuple[ModelSpec, str]:
    """Split `<model>/<path>` at the longest known id; returns what to send to its server."""
    rest = incoming.path.removeprefix(UPSTREAM_PREFIX)
    found = catalog.split_path(rest)
    if found is None:
        raise ModelNotFound(f"no model's id starts '{rest[:200]}'; GET /v1/models lists them")
    spec, path = found
    query = incoming.query
    return spec, "/" + quote(path, safe=PATH_SAFE) + (f"?{query}" if query else "")
