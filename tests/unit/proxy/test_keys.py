"""Who may do what: every route by every kind of key, and the holes that other programs had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from flask.testing import FlaskClient

from smartproxy.config.load import load_settings
from smartproxy.errors import (
    ConfigError,
    InvalidApiKey,
    LoadFailed,
    ModelRequired,
    SmartProxyError,
    discreet,
    without_paths,
)
from smartproxy.proxy.app import create_app
from smartproxy.proxy.inference import Incoming
from smartproxy.proxy.relay.upstream import Job
from smartproxy.proxy.worker.plain import Application
from tests.support.openapi import DOCUMENT

CLIENT, ADMIN = "client-key", "admin-key"
KEYS = {"none": None, "wrong": "wrong-key", "client": CLIENT, "admin": ADMIN}
#: a model that no request may name: reaching it means that the key was good
UNKNOWN = {"model": "nobody"}
ROUTES = [
    (method.upper(), path)
    for path, operations in DOCUMENT["paths"].items()
    for method in operations
    if method in ("get", "post", "put", "patch", "delete")
]


def application(folder: Path, **settings: Any) -> Application:
    config = folder / "config.json"
    config.write_text(json.dumps({"models": {"m": {"path": "m.gguf"}}, **settings}))
    return create_app(load_settings(config, environ={}))


def client(folder: Path, **settings: Any) -> FlaskClient:
    flask: Any = application(folder, **settings).wsgi
    made: FlaskClient = flask.test_client()
    return made


def with_key(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def allowed(path: str, who: str, settings: dict[str, Any]) -> bool:
    """Say who may use a route, in the words of docs/security.md."""
    if path in ("/health", "/openapi.json"):
        return True
    if path.startswith("/api/") and "admin_keys" in settings:
        return who == "admin"
    if "api_keys" not in settings:
        return True
    return who == "client" or (who == "admin" and "admin_keys" in settings)


@pytest.mark.parametrize("who", KEYS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"api_keys": [CLIENT]},
        {"admin_keys": [ADMIN]},
        {"api_keys": [CLIENT], "admin_keys": [ADMIN]},
    ],
    ids=["no keys", "api_keys", "admin_keys", "both"],
)
def test_every_route_by_every_kind_of_key(
    tmp_path: Path, settings: dict[str, Any], who: str
) -> None:
    asked = client(tmp_path, **settings)
    wrong = []
    for method, path in ROUTES:
        target = re.sub(r"\{id\}", "nobody", path)
        target = re.sub(r"\{\w+\}", "1", target)
        answer = asked.open(target, method=method, json=UNKNOWN, headers=with_key(KEYS[who]))
        if (answer.status_code == 401) is allowed(path, who, settings):
            wrong.append((method, path, answer.status_code))
    assert wrong == []


CHANGING = [
    *(("POST", "/props"), ("POST", "/lora-adapters"), ("POST", "/slots/0?action=erase")),
    *(("POST", "/slots/0?action=restore"), ("GET", "/slots?action=save"), ("POST", "/slots/1")),
    *(("GET", "/tools"), ("POST", "/tools"), ("GET", "/tools/x"), ("GET", "/cors-proxy?url=x")),
    *(("POST", "//props"), ("POST", "/%70rops"), ("POST", "/./props"), ("POST", "/PROPS")),
    *(("POST", "/props#x"), ("POST", "/x/../props"), ("PUT", "/props"), ("DELETE", "/slots/0")),
]
HARMLESS = [("GET", "/props"), ("GET", "/slots"), ("GET", "/lora-adapters"), ("POST", "/tokenize")]


def decide(app: Application, method: str, target: str, key: str | None) -> Job:
    headers = tuple((k.lower().encode(), v.encode()) for k, v in with_key(key).items())
    path = re.split(r"[?#]", target)[0].replace("%70", "p")
    return app.decide(
        Incoming(
            method=method,
            path=path,
            target=target,
            headers=headers,
            fields={b"host": b"localhost", **dict(headers)},
            body=b'{"model": "m"}',
            behind_front=False,
        )
    )


@pytest.mark.parametrize("prefix", ["", "/upstream/m"])
@pytest.mark.parametrize(("method", "target"), CHANGING)
def test_what_changes_a_server_for_everybody_needs_an_admin_key(
    tmp_path: Path, method: str, target: str, prefix: str
) -> None:
    app = application(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    with pytest.raises(InvalidApiKey, match="admin_keys"):
        decide(app, method, prefix + target, CLIENT)
    assert decide(app, method, prefix + target, ADMIN).model_id == "m"
    for settings in ({"api_keys": [CLIENT]}, {}):
        app = application(tmp_path, **settings)
        assert decide(app, method, prefix + target, CLIENT).model_id == "m"


@pytest.mark.parametrize("prefix", ["", "/upstream/m"])
@pytest.mark.parametrize(("method", "target"), HARMLESS)
def test_what_only_reads_a_server_needs_a_client_key(
    tmp_path: Path, method: str, target: str, prefix: str
) -> None:
    app = application(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    assert decide(app, method, prefix + target, CLIENT).model_id == "m"
    with pytest.raises(InvalidApiKey):
        decide(app, method, prefix + target, None)


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/models", "/V1/models", "/v1%2Fmodels", "/v1/./models", "/health/../v1/models"),
        *("/health/", "/health%2f..%2fv1/models", "/openapi.json/../status", "/HEALTH"),
        *("/health;/v1/models", "/health%00/v1/models", "/v1/models/", "/%76%31/models"),
    ],
)
def test_no_spelling_of_a_path_goes_around_the_key(tmp_path: Path, path: str) -> None:
    asked = client(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    as_sent = {"PATH_INFO": unquote(path)}  # the client would take `//v1` for a host
    assert asked.get("/", environ_overrides=as_sent).status_code == 401
    assert asked.post("/", json=UNKNOWN, environ_overrides=as_sent).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        *("//api/models/m/unload", "/API/models/m/unload", "/api//models/m/unload"),
        *("/v1/../api/models/m/unload", "/%61pi/models/m/unload", "/api%2Fmodels/m/unload"),
    ],
)
def test_no_spelling_of_a_path_lets_a_client_unload(tmp_path: Path, path: str) -> None:
    asked = client(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    as_sent = {"PATH_INFO": unquote(path)}
    answer = asked.post("/", json=UNKNOWN, headers=with_key(CLIENT), environ_overrides=as_sent)
    assert answer.status_code in (401, 404)


def test_an_empty_key_opens_nothing(tmp_path: Path) -> None:
    for keys in ([""], [" "], ["a", ""]):
        for name in ("api_keys", "admin_keys"):
            with pytest.raises(ConfigError, match=name):
                application(tmp_path, **{name: keys})
    asked = client(tmp_path, api_keys=[CLIENT])
    for headers in ({"Authorization": "Bearer "}, {"X-Api-Key": ""}, {"Authorization": "Bearer"}):
        assert asked.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "key", ["' OR '1'='1", "x'; DROP TABLE servers; --", '"', "client-key'--", "%", "client-ke%79"]
)
def test_sql_in_a_key_is_text(tmp_path: Path, key: str) -> None:
    asked = client(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    for path in ("/v1/models", "/api/models/m/plan"):
        assert asked.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 401
        assert asked.get(path, headers={"X-Api-Key": key}).status_code == 401


@pytest.mark.parametrize(
    "name",
    [
        *(
            "--model=/etc/passwd",
            "-m",
            "m --tools all",
            "../../etc/passwd",
            "/etc/passwd",
            "m\n--x",
        ),
        *("..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "m\x00", "~/m.gguf"),
    ],
)
def test_a_name_in_a_request_is_no_flag_and_no_path(tmp_path: Path, name: str) -> None:
    app = application(tmp_path)
    asked = client(tmp_path)
    answer = asked.post("/v1/chat/completions", json={"model": name})
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(SmartProxyError) as refused:
        decide(app, "GET", f"/upstream/{name}/props", None)
    assert refused.value.http_status == 404


def test_a_packed_body_is_not_unpacked(tmp_path: Path) -> None:
    asked = client(tmp_path)
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    answer = asked.post("/v1/chat/completions", data=b"\x1f\x8b" + bytes(50), headers=packed)
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "invalid_json")


def test_a_stranger_learns_how_it_goes_and_nothing_else(tmp_path: Path) -> None:
    asked = client(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    assert asked.get("/health").json == {
        "status": "degraded",
        "mode": "cpu",
        "reasons": ["the state file can't be used"],
    }
    text = asked.get("/health", headers={"Accept": "text/plain"})
    assert text.text == "status degraded, mode cpu\n- the state file can't be used\n"
    for key in (CLIENT, ADMIN):
        assert "manager" in asked.get("/health", headers=with_key(key)).json
    assert "manager" in client(tmp_path).get("/health").json


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no such file /home/a/x.gguf", "no such file x.gguf"),
        ("model 'm': /srv/m/x.gguf: broken", "model 'm': x.gguf: broken"),
        ("failed to open '/a b/c.gguf'", "failed to open 'a b/c.gguf'"),
        ("at /build/src/ggml.c:12", "at ggml.c:12"),
        ("log:/var/x.log, ~/y/z", "log:x.log, z"),
        ("model 'org/m' at https://a.example/b", "model 'org/m' at https://a.example/b"),
        ("3 / 4 and/or", "3 / 4 and/or"),
    ],
)
def test_an_error_for_a_client_carries_no_absolute_path(text: str, told: str) -> None:
    assert without_paths(text) == told
    assert str(discreet(LoadFailed(text))) == told
    kept = ModelRequired("GET /v1/models lists them")
    assert discreet(kept) is kept


def test_only_admins_are_told_paths(tmp_path: Path) -> None:
    app = application(tmp_path, api_keys=[CLIENT], admin_keys=[ADMIN])
    assert decide(app, "POST", "/v1/completions", CLIENT).discreet
    assert not decide(app, "POST", "/v1/completions", ADMIN).discreet
    assert not decide(application(tmp_path), "POST", "/v1/completions", None).discreet
