"""Every error a user can meet: its HTTP status, its code (SPEC 2) and its text.

An error is raised where the fault is known. `openai_body` turns it into the OpenAI body, in one
place. The docstring of a class says when it is raised. Status and code of each:

    SmartProxyError           500  internal_error
    |-- InvalidJson           400  invalid_json
    |-- ModelRequired         400  model_required
    |-- InvalidApiKey         401  invalid_api_key
    |-- HostNotAllowed        403  host_not_allowed
    |-- OriginNotAllowed      403  origin_not_allowed
    |-- ModelNotAllowed       403  model_not_allowed
    |-- ModelNotFound         404  model_not_found
    |-- RouteNotFound         404  not_found
    |-- BadRequest            400  bad_request
    |-- RequestTooSlow        408  request_too_slow
    |-- RequestTooLarge       413  request_too_large
    |-- HeadTooLarge          431  request_too_large
    |-- QueueFull             429  queue_full
    |-- RateLimitExceeded     429  rate_limit_exceeded
    |-- UpstreamError         502  backend_failed
    |-- NoFit                 503  insufficient_gpu_memory
    |-- GpuMemoryBusy         503  gpu_memory_busy
    |-- PoolBusy              503  pool_busy
    |-- LoadFailed            503  model_load_failed
    |-- MetadataError         503  model_load_failed
    |-- ManagerDown           503  manager_unavailable
    |-- ShuttingDown          503  shutting_down
    |-- LoadTimeout           504  load_timeout
    |-- UpstreamTimeout       504  upstream_timeout
    |-- ConfigError           ends the command; never sent
    |-- ObserveError          becomes a GPU's `error`; never sent
    |-- StateConflict         500  internal_error, a fault of ours
    `-- UnknownCacheType      500  internal_error, refused by the settings before
"""

from __future__ import annotations

import re
from typing import ClassVar


class SmartProxyError(Exception):
    """Base of all our errors; the message says what, which, the numbers and the next step."""

    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    #: OpenAI's coarse `type`
    type: ClassVar[str] = "server_error"
    #: the request field at fault, where there is one
    param: ClassVar[str | None] = None
    #: seconds for `Retry-After`; None sends no such header
    retry_after_s: ClassVar[int | None] = None


class InvalidJson(SmartProxyError):
    """The body is not JSON, or not an object."""

    http_status, code, type = 400, "invalid_json", "invalid_request_error"


class ModelRequired(SmartProxyError):
    """No model named and no default configured."""

    http_status, code, type, param = 400, "model_required", "invalid_request_error", "model"


class InvalidApiKey(SmartProxyError):
    """Missing or wrong API key."""

    http_status, code, type = 401, "invalid_api_key", "authentication_error"


class HostNotAllowed(SmartProxyError):
    """The Host is none of the proxy's names: a page whose DNS was pointed at us looks like this."""

    http_status, code, type = 403, "host_not_allowed", "permission_error"


class OriginNotAllowed(SmartProxyError):
    """A page of another origin must not send this."""

    http_status, code, type = 403, "origin_not_allowed", "permission_error"


class ModelNotAllowed(SmartProxyError):
    """The API key must not use this model (`models` of the key)."""

    http_status, code, type, param = 403, "model_not_allowed", "permission_error", "model"


class ModelNotFound(SmartProxyError):
    """The named model is not in the catalogue."""

    http_status, code, type, param = 404, "model_not_found", "invalid_request_error", "model"


class RouteNotFound(SmartProxyError):
    """No such route."""

    http_status, code, type = 404, "not_found", "invalid_request_error"


class RequestTooLarge(SmartProxyError):
    """The body is over `max_body_mb`."""

    http_status, code, type = 413, "request_too_large", "invalid_request_error"


class RequestTooSlow(SmartProxyError):
    """The request did not come to its end: its head in time, or its body with enough progress."""

    http_status, code, type = 408, "request_too_slow", "invalid_request_error"


class BadRequest(SmartProxyError):
    """What came is not a valid HTTP/1.1 request, or asks for what no worker does."""

    http_status, code, type = 400, "bad_request", "invalid_request_error"


class HeadTooLarge(SmartProxyError):
    """The request's head is larger than a worker reads."""

    http_status, code, type = 431, "request_too_large", "invalid_request_error"


class QueueFull(SmartProxyError):
    """More than `max_queue` requests already wait for a load."""

    http_status, code, type, retry_after_s = 429, "queue_full", "rate_limit_error", 5


class RateLimitExceeded(SmartProxyError):
    """The API key has `max_in_flight` requests open already."""

    http_status, code, type, retry_after_s = 429, "rate_limit_exceeded", "rate_limit_error", 1


class UpstreamError(SmartProxyError):
    """The server died before any byte was sent, and one reload and retry failed too."""

    http_status, code = 502, "backend_failed"


class NoFit(SmartProxyError):
    """The model can never fit this machine as configured."""

    http_status, code = 503, "insufficient_gpu_memory"


class GpuMemoryBusy(SmartProxyError):
    """It would fit, but busy models held the memory past `queue_timeout`."""

    http_status, code, retry_after_s = 503, "gpu_memory_busy", 10


class PoolBusy(SmartProxyError):
    """Busy servers held every place of the pool past `queue_timeout`."""

    http_status, code, retry_after_s = 503, "pool_busy", 10


class LoadFailed(SmartProxyError):
    """The server would not start; the message carries the last useful line of its log."""

    http_status, code = 503, "model_load_failed"


class ManagerDown(SmartProxyError):
    """The model is not loaded and the manager does not answer."""

    http_status, code, retry_after_s = 503, "manager_unavailable", 2


class ShuttingDown(SmartProxyError):
    """The proxy is being stopped."""

    http_status, code, retry_after_s = 503, "shutting_down", 5


class LoadTimeout(SmartProxyError):
    """Loading took longer than `load_timeout`, or made no progress for `load_stall_timeout`."""

    http_status, code, type = 504, "load_timeout", "timeout_error"


class UpstreamTimeout(SmartProxyError):
    """The server took longer than `request_timeout`."""

    http_status, code, type = 504, "upstream_timeout", "timeout_error"


class ConfigError(SmartProxyError):
    """The configuration says something wrong: which key, what it got, what it must be."""


class StateConflict(SmartProxyError):
    """Two writers disagree about a row: a fault of ours."""


class ObserveError(SmartProxyError):
    """NVML can't be read, or one of its GPUs can't."""


class MetadataError(SmartProxyError):
    """A GGUF file can't be read; the message names the file and the reason."""

    http_status, code = 503, "model_load_failed"


#: what the manager says of files, and a server's last log line, may name paths
TELLS_PATHS = (LoadFailed, LoadTimeout, MetadataError, UpstreamError, NoFit)


class UnknownCacheType(SmartProxyError):
    """A KV cache type that llama.cpp does not have."""


class StateError(Exception):
    """The state file can't be read or written.

    No answer to a request: who reads or writes for one says what that means for it.
    """


class StateRefused(StateError):
    """A rule of the state file refused a row: its model or port has a live server already."""


class StateDamaged(StateError):
    """The state file holds what SQLite never wrote: it must be made anew."""


#: errors that the manager answers a load with, by the code stored in the state file
BY_CODE: dict[str, type[SmartProxyError]] = {
    error.code: error
    for error in (
        ModelNotFound,
        QueueFull,
        UpstreamError,
        NoFit,
        GpuMemoryBusy,
        PoolBusy,
        LoadFailed,
        ManagerDown,
        ShuttingDown,
        LoadTimeout,
        UpstreamTimeout,
    )
}


def from_code(code: str, message: str) -> SmartProxyError:
    """Return the error that a stored answer stands for; an unknown code is our own fault."""
    return BY_CODE.get(code, SmartProxyError)(message)


#: an absolute path: its folders, and the name that it ends with. A URL is none.
_PATH = re.compile(r"(?<![\w.~/-])~?/(?!/)(?:[^/\s'\"`,;()]+/)*([^/\s'\"`,;()]+)")


def without_paths(text: str) -> str:
    """Return a text with the last name of every absolute path in its place."""
    return _PATH.sub(r"\1", text)


def discreet(error: SmartProxyError) -> SmartProxyError:
    """Return an error as it is told to who must not see the paths of this machine."""
    return type(error)(without_paths(str(error))) if isinstance(error, TELLS_PATHS) else error


def openai_body(error: SmartProxyError) -> dict[str, dict[str, str | None]]:
    """Return the JSON object OpenAI clients expect for an error."""
    return {
        "error": {
            "message": str(error),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
