"""The Flask application of one worker: settings in, routes and error handling out."""

from __future__ import annotations

import logging

from flask import Flask, Response
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from smartproxy.catalog.catalog import build_catalog
from smartproxy.config.settings import Settings
from smartproxy.errors import (
    RequestTooLarge,
    RouteNotFound,
    SmartProxyError,
)
from smartproxy.proxy import routes
from smartproxy.proxy.ensure import Broker
from smartproxy.proxy.inference import Incoming, job_for
from smartproxy.proxy.pages import models, monitoring
from smartproxy.proxy.pages.counting import RequestCounts
from smartproxy.proxy.relay.relay import Job
from smartproxy.proxy.wire.own_answers import cross_origin, error_answer
from smartproxy.proxy.worker.plain import Application
from smartproxy.state.store import Store

logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> Application:
    """Return the application. Call it after the fork: it holds sockets and threads."""
    app = Flask(__name__, static_folder=None)
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_mb << 20
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # preflights are answered in routes.py
    catalog = build_catalog(settings)
    store = Store(settings.state_dir / "state.db")
    counting, broker = RequestCounts(store), Broker(store, settings)
    app.register_blueprint(monitoring.blueprint(settings, store, counting))
    app.register_blueprint(models.blueprint(settings, catalog, store))

    def decide(incoming: Incoming) -> Job:
        return job_for(incoming, settings, catalog, counting.settled)

    app.register_blueprint(routes.blueprint(decide, broker, counting.refused))
    handle_errors(app, settings)
    app.after_request(_open_to_pages)
    return Application(wsgi=app, broker=broker, decide=decide, on_refused=counting.refused)


def _open_to_pages(response: Response) -> Response:
    """Let pages of other origins read our own answers, as they can read llama-server's."""
    for name, value in cross_origin(routes.origin()):
        response.headers.setdefault(name.decode(), value.decode("latin-1"))
    return response


def handle_errors(app: Flask, settings: Settings) -> None:
    """The one place where an error becomes an answer."""

    @app.errorhandler(SmartProxyError)
    def ours(error: SmartProxyError) -> Response:
        return error_response(error)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return error_response(
            RequestTooLarge(f"the body is larger than {settings.max_body_mb} MB (max_body_mb)")
        )

    @app.errorhandler(HTTPException)
    def werkzeug(error: HTTPException) -> Response:
        if error.code is not None and error.code >= 500:
            return unexpected(error)
        return error_response(RouteNotFound("no such route here"))

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        logger.exception("a fault of ours")
        return error_response(
            SmartProxyError(f"a fault of the proxy itself ({type(error).__name__}): see its log")
        )


def error_response(error: SmartProxyError) -> Response:
    """Return an error as Flask's answer."""
    return routes.as_response(error_answer(error, routes.origin()))
