"""The Flask application of one worker: settings in, routes and error handling out."""

from __future__ import annotations

import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from smartproxy.catalog.live import Live
from smartproxy.config.settings import Settings
from smartproxy.errors import (
    RequestTooLarge,
    RouteNotFound,
    SmartProxyError,
)
from smartproxy.proxy import routes
from smartproxy.proxy.browsers import Browsers
from smartproxy.proxy.ensure import Broker
from smartproxy.proxy.inference import Incoming, check_head, job_for
from smartproxy.proxy.pages import models, monitoring, pausing
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
    live, browsers = Live(settings), Browsers(settings)
    store = Store(settings.state_dir / "state.db")
    counting, broker = RequestCounts(store), Broker(store, live)
    app.register_blueprint(monitoring.blueprint(live, store, counting))
    app.register_blueprint(models.blueprint(live, store, broker))
    app.register_blueprint(pausing.blueprint(live, store))

    def decide(incoming: Incoming) -> Job:
        return job_for(incoming, live.now, browsers, on_settled=counting.settled)

    def admit(incoming: Incoming, length_bytes: int) -> int:
        settings = live.settings
        check_head(incoming, length_bytes, settings, browsers)
        return settings.max_body_mb << 20

    app.register_blueprint(routes.blueprint(decide, broker, browsers, counting.refused))
    mind_browsers(app, browsers)
    handle_errors(app, live, browsers)
    return Application(
        wsgi=app,
        broker=broker,
        decide=decide,
        admit=admit,
        browsers=browsers,
        on_refused=counting.refused,
    )


def mind_browsers(app: Flask, browsers: Browsers) -> None:
    """Refuse what pages must not send, to whatever route, and let pages read what they may."""

    @app.before_request
    def check() -> None:
        browsers.check(
            request.method, request.path, request.headers.get, trust_host=routes.behind_front()
        )

    @app.after_request
    def open_to_pages(response: Response) -> Response:
        for name, value in cross_origin(routes.reader(browsers)):
            response.headers.setdefault(name.decode(), value.decode("latin-1"))
        return response


def handle_errors(app: Flask, live: Live, browsers: Browsers) -> None:
    """The one place where an error becomes an answer."""

    def error_response(error: SmartProxyError) -> Response:
        return routes.as_response(error_answer(error, routes.reader(browsers)))

    @app.errorhandler(SmartProxyError)
    def ours(error: SmartProxyError) -> Response:
        return error_response(error)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return error_response(
            RequestTooLarge(f"the body is larger than {live.settings.max_body_mb} MB (max_body_mb)")
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
