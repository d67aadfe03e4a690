"""Which pages may reach the proxy, by the headers that browsers send of themselves."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from smartproxy.config.settings import ModelSettings, Settings
from smartproxy.errors import HostNotAllowed, OriginNotAllowed
from smartproxy.proxy.browsers import Browsers

OTHER = "https://other.example"
PAGE = "https://chat.example"
JSON = {"Content-Type": "application/json; charset=utf-8"}
CHAT, LOAD = "/v1/chat/completions", "/api/models/m/load"


def browsers(**settings: Any) -> Browsers:
    return Browsers(Settings(models={"m": ModelSettings(path=Path("m.gguf"))}, **settings))


def check(
    those: Browsers,
    method: str = "POST",
    path: str = CHAT,
    headers: dict[str, str] | None = None,
    *,
    trust_host: bool = False,
) -> None:
    sent = {"host": "localhost:8000", **{k.lower(): v for k, v in (headers or {}).items()}}
    those.check(
        method, path, lambda name, other: sent.get(name.lower(), other), trust_host=trust_host
    )


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:8000", "127.0.0.1", "10.0.0.7:8000", "[::1]:8000", ""),
        *("gpu.lan", "GPU.lan:1", "a.b.example", "localhost."),
        *(socket.gethostname(), f"{socket.gethostname().partition('.')[0]}.local:80"),
    ],
)
def test_the_proxys_own_names_are_allowed(host: str) -> None:
    check(browsers(allowed_hosts=("gpu.lan", "*.example")), headers={"Host": host})


@pytest.mark.parametrize(
    "host", ["evil.test", "localhost.evil.test", "127.0.0.1.evil.test", "example", "evil.test:8000"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", CHAT), ("POST", LOAD)])
def test_dns_rebinding_any_other_name_is_refused(host: str, method: str, path: str) -> None:
    those = browsers(allowed_hosts=("*.example",))
    with pytest.raises(HostNotAllowed, match="allowed_hosts"):
        check(those, method, path, {"Host": host, **JSON})
    check(those, method, path, {"Host": host, **JSON}, trust_host=True)


def test_a_star_is_every_name() -> None:
    check(browsers(allowed_hosts=("*",)), headers={"Host": "evil.test"})


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost", "https://localhost:3000", "http://127.0.0.1:5173", "http://[::1]:1"),
        *("http://127.8.8.8", PAGE, PAGE.upper()),
    ],
)
def test_pages_of_this_machine_and_allowed_ones_may_read_and_use(origin: str) -> None:
    those = browsers(allowed_origins=(PAGE,))
    check(those, headers={"Origin": origin})
    assert those.reader(origin, CHAT) == origin.encode()


@pytest.mark.parametrize(
    "origin",
    [
        *(OTHER, "null", "http://localhost.evil.test", "http://chat.example", f"{PAGE}:444"),
        *("file://", "http://10.0.0.7", "https://chat.example.evil.test", "ftp://localhost"),
    ],
)
def test_csrf_other_pages_may_neither_read_nor_use(origin: str) -> None:
    those = browsers(allowed_origins=(PAGE,))
    assert those.reader(origin, CHAT) == b""
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}):
        with pytest.raises(OriginNotAllowed, match="allowed_origins"):
            check(those, headers={"Origin": origin, **headers})
    with pytest.raises(OriginNotAllowed):
        check(those, "OPTIONS", headers={"Origin": origin, **JSON})


def test_what_only_a_program_can_send_is_relayed_though_it_passes_an_origin_on() -> None:
    check(browsers(), headers={"Origin": OTHER, **JSON})


def test_a_star_opens_inference_and_never_operations() -> None:
    those = browsers(allowed_origins=("*",))
    check(those, headers={"Origin": OTHER})
    check(those, "GET", "/upstream/m/", {"Sec-Fetch-Site": "cross-site"})
    assert those.reader(OTHER, CHAT) == b"*"
    assert those.reader(OTHER, LOAD) == b""
    with pytest.raises(OriginNotAllowed):
        check(those, path=LOAD, headers={"Origin": OTHER, **JSON})


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", [OTHER, PAGE, "http://localhost:3000", "null"])
def test_operations_are_for_the_proxys_own_pages(method: str, origin: str) -> None:
    those = browsers(allowed_origins=(PAGE,))
    with pytest.raises(OriginNotAllowed):
        check(those, method, LOAD, {"Origin": origin, "Authorization": "Bearer k", **JSON})
    check(those, method, LOAD, {"Origin": "http://localhost:8000", **JSON})


def test_an_operation_must_have_what_a_page_cannot_send() -> None:
    for headers in (JSON, {"X-Requested-With": "x"}, {"X-Api-Key": "k"}, {"Authorization": "k"}):
        check(browsers(), path=LOAD, headers=headers)
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}):
        with pytest.raises(OriginNotAllowed, match="X-Requested-With"):
            check(browsers(), path=LOAD, headers=headers)
    check(browsers(), "GET", "/api/models/m/plan")


@pytest.mark.parametrize("path", ["/upstream/m/", LOAD])
def test_pictures_frames_and_forms_of_other_sites_are_refused(path: str) -> None:
    site = {"Sec-Fetch-Site": "cross-site"}
    frame = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe", "Sec-Fetch-User": "?1"}
    for headers in (site, {**site, "Sec-Fetch-Mode": "no-cors"}, {**site, **frame}):
        with pytest.raises(OriginNotAllowed):
            check(browsers(), "GET", path, headers)
    check(browsers(), "GET", path, {"Sec-Fetch-Site": "same-origin"})
    check(browsers(), "GET", path, {"Sec-Fetch-Site": "none"})


def test_a_link_that_a_person_follows_works() -> None:
    link = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Sec-Fetch-User": "?1"}
    check(browsers(), "GET", "/upstream/m/", {"Sec-Fetch-Site": "cross-site", **link})
    with pytest.raises(OriginNotAllowed):
        check(browsers(), "POST", "/upstream/m/", {"Sec-Fetch-Site": "cross-site", **link})


def test_a_host_is_looked_at_once() -> None:
    those = browsers()
    for _ in range(3):
        check(those)
    assert those.host_allowed.cache_info().misses == 1
    for number in range(1000):  # who sends many different ones takes no memory
        with pytest.raises(HostNotAllowed):
            check(those, headers={"Host": f"h{number}.test"})
    assert those.host_allowed.cache_info().currsize <= 256
