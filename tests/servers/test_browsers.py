"""A real browser at a real proxy: what pages of other sites can do, and what allowed ones can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.chromium import Browser, Site, browser, document_at
from tests.support.running import Proxy, fake_model, running

ALLOWED = "chat.example"
#: what a page that is not allowed tries, by every way that a browser offers
ATTACK = """
const text = {method: 'POST', mode: 'no-cors', body: CHAT};
const json = {method: 'POST', body: CHAT, headers: {'Content-Type': 'application/json'}};
const form = document.createElement('form');
const target = Object.assign(document.createElement('iframe'), {name: 'target'});
document.body.append(target, form);
Object.assign(form, {method: 'POST', target: 'target', action: PROXY + '/api/models/used/unload'});
form.submit();
const frame = document.createElement('iframe');
frame.src = PROXY + '/upstream/unused/';
document.body.append(frame);
const result = {
  models: await got(PROXY + '/v1/models'),
  health: await got(PROXY + '/health'),
  status: await got(PROXY + '/status'),
  metrics: await got(PROXY + '/metrics'),
  upstream: await got(PROXY + '/upstream/unused/props'),
  plan: await got(PROXY + '/api/models/used/plan'),
  simple_chat: await got(PROXY + '/v1/chat/completions', text),
  json_chat: await got(PROXY + '/v1/chat/completions', json),
  load: await got(PROXY + '/api/models/unused/load', {method: 'POST', mode: 'no-cors'}),
  unload: await got(PROXY + '/api/models/used/unload', {method: 'POST'}),
  json_unload: await got(PROXY + '/api/models/used/unload', {...json, body: '{}'}),
  picture: await shown(PROXY + '/upstream/unused/props'),
};
navigator.sendBeacon(PROXY + '/v1/chat/completions', CHAT);
navigator.sendBeacon(PROXY + '/api/models/used/unload', '');
await got(PROXY + '/health');
await report(result);
"""
USE = """
const key = {'Content-Type': 'application/json', 'Authorization': 'Bearer whatever'};
const chat = body => ({method: 'POST', body, headers: key});
await report({
  models: await got(PROXY + '/v1/models'),
  chat: await got(PROXY + '/v1/chat/completions', chat(CHAT)),
  simple_chat: await got(PROXY + '/v1/chat/completions', {method: 'POST', body: CHAT}),
  unknown: await got(PROXY + '/v1/chat/completions', chat('{"model": "none"}')),
  unload: await got(PROXY + '/api/models/used/unload', chat('{}')),
});
"""


@dataclass(frozen=True)
class World:
    """A proxy, and a browser whose site is under `ALLOWED` an allowed origin."""

    proxy: Proxy
    browser: Browser

    def report_of(self, name: str, script: str, model: str) -> Any:
        body = json.dumps({"model": model, "messages": [], "max_tokens": 1})
        known = f"const PROXY = '{self.proxy.url}', CHAT = '{body}';"
        return self.browser.report_of(name, known + script)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, site = tmp_path_factory.mktemp("browsers"), Site()
    models = {"used": fake_model(), "unused": fake_model()}
    with (
        closing(site),
        browser(folder, site) as chromium,
        running(folder, models, allowed_origins=[f"http://{ALLOWED}:{site.port}"]) as proxy,
    ):
        assert proxy.chat("used").status_code == 200
        yield World(proxy, chromium)


def test_a_page_of_another_site_can_neither_read_nor_load_nor_unload(world: World) -> None:
    told = world.report_of("evil.example", ATTACK, "unused")
    unreadable = {"simple_chat", "load"}
    assert {what for what in told if told[what] != "refused"} == unreadable
    assert {told[what] for what in unreadable} == {"sent, unreadable"}
    servers = world.proxy.rows("SELECT model_id, state FROM servers")
    assert servers == [{"model_id": "used", "state": "ready"}]
    assert world.proxy.rows("SELECT * FROM demands") == []


@pytest.mark.parametrize("name", [ALLOWED, "127.0.0.1"])
def test_a_page_of_an_allowed_origin_or_of_this_machine_works(world: World, name: str) -> None:
    told = world.report_of(name, USE, "used")
    assert told["models"][0] == told["chat"][0] == told["simple_chat"][0] == 200
    assert told["unknown"][0] == 404
    assert "model_not_found" in told["unknown"][1]
    assert told["unload"] == "refused"
    assert world.proxy.states()["used"] == "ready"


def test_dns_rebinding_is_refused_in_a_browser(world: World, tmp_path: Path) -> None:
    shown = document_at(f"http://evil.example:{world.proxy.port}/v1/models", tmp_path)
    assert "host_not_allowed" in shown
    assert "unused" not in shown
