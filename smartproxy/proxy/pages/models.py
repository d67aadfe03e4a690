"""The catalogue, and what a person does with it: load, unload and plan."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g, jsonify, request

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.catalog.live import Live
from smartproxy.errors import ManagerDown, ModelNotFound, RouteNotFound, StateError
from smartproxy.proxy import auth
from smartproxy.proxy.ask import Question, ask_in_loop
from smartproxy.proxy.ensure import Broker
from smartproxy.proxy.pages import view
from smartproxy.proxy.pages.discreet import for_role
from smartproxy.proxy.relay.errand import ErrandResponse
from smartproxy.proxy.wire.own_answers import OwnAnswer, json_answer
from smartproxy.state.store import Store

#: a plan is decided in milliseconds; before it the GPUs must have been looked at once
PLAN_LIMIT_S = 30.0
#: no page of another origin reads what /api/ says
NOBODY = b""


def blueprint(live: Live, store: Store, broker: Broker) -> Blueprint:
    """Return the operations' routes."""
    operations = Blueprint("operations", __name__)

    @operations.before_request
    def check_key() -> None:
        g.role = auth.check(request, live.settings)
        g.key = auth.named_key(request.headers.get, live.settings)

    def found(rest: str) -> tuple[ModelSpec, str]:
        """Return the model that a path names, if the key may use it, and what follows."""
        spec_and_verb = live.catalog.split_path(rest)
        if spec_and_verb is None:
            raise ModelNotFound(f"no model's id starts '{rest[:200]}'")
        auth.check_model(g.key, spec_and_verb[0].id, live.catalog)
        return spec_and_verb

    def listed(role: auth.Role) -> list[dict[str, Any]]:
        try:
            known = view.model_list(store, live.catalog)
        except StateError as error:
            raise ManagerDown(f"the state file can't be read: {error}") from None
        return [for_role(entry, role) for entry in known]

    def entry(model_id: str, role: auth.Role) -> dict[str, Any]:
        return next(entry for entry in listed(role) if entry["id"] == model_id)

    @operations.get("/v1/models")
    @operations.get("/models")
    def models() -> Response:
        catalog = live.catalog
        data = [each for each in listed(g.role) if auth.may_use(g.key, each["id"], catalog)]
        return jsonify({"object": "list", "data": data})

    @operations.get("/v1/models/<path:name>")
    @operations.get("/models/<path:name>")
    def model(name: str) -> Response:
        catalog = live.catalog
        model_id = catalog.resolve(name).id
        auth.check_model(g.key, model_id, catalog)
        return jsonify(entry(model_id, g.role))

    @operations.post("/api/models/<path:rest>")
    def act(rest: str) -> Response:
        spec, verb = found(rest)
        if verb not in ("load", "unload"):
            raise RouteNotFound(f"no operation POST '{verb}'; there are load and unload")
        limit_s = live.settings.longest_wait_s(spec.id)
        question = Question(kind=verb, model_id=spec.id, limit_s=limit_s)
        role = g.role

        async def work() -> OwnAnswer:
            await ask_in_loop(broker, store, live, question)
            return json_answer(entry(spec.id, role))

        return ErrandResponse(work, NOBODY)

    @operations.get("/api/models/<path:rest>")
    def tell(rest: str) -> Response:
        spec, verb = found(rest)
        if verb != "plan":
            raise RouteNotFound(f"no operation GET '{verb}'; there is plan")
        question = Question(kind="plan", model_id=spec.id, limit_s=PLAN_LIMIT_S)

        async def work() -> OwnAnswer:
            return json_answer(await ask_in_loop(broker, store, live, question))

        return ErrandResponse(work, NOBODY)

    return operations
