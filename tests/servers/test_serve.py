"""The whole proxy over the stand-in llama-server: loading, making room, draining, surviving."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support.paths import ROOT
from tests.support.ports import free_pool, free_port
from tests.support.running import Proxy, Streaming, fake_model, running, wait_until
from tests.support.wire import PAGE


def wait_state(proxy: Proxy, model: str, state: str) -> None:
    wait_until(lambda: proxy.states().get(model) == state, what=f"{model} {state}")


def code_of(answer: requests.Response) -> str:
    assert answer.headers["X-Smartproxy-Error"] == answer.json()["error"]["code"]
    code: str = answer.json()["error"]["code"]
    return code


def starts(proxy: Proxy, model: str = "") -> int:
    return len(proxy.rows(f"SELECT 1 FROM events WHERE message LIKE '%starting model={model}%'"))


def reason_of(proxy: Proxy, model: str) -> str:
    rows = proxy.rows(f"SELECT reason FROM servers WHERE model_id = '{model}'")
    reason: str = rows[0]["reason"]
    return reason


def demands_for(proxy: Proxy, model: str) -> list[dict[str, Any]]:
    return proxy.rows(f"SELECT * FROM demands WHERE model_id = '{model}'")


def servers_of(proxy: Proxy, model: str) -> list[psutil.Process]:
    argv = f"--alias {model} "
    return [each for each in proxy.llama_servers() if argv in " ".join(each.cmdline()) + " "]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy for tests that change nothing of it: each has a model of its own."""
    folder = tmp_path_factory.mktemp("shared")
    models = {
        "waited-for": fake_model(load_s=0.5),
        "too-big": fake_model(fail_load="oom"),
        "org/m": fake_model(),
        "unloaded": fake_model(),
        "stubborn": fake_model(ignore_term=2),
        "never": fake_model(silent_load=1),
        "left": fake_model(),
        "killed": fake_model(),
        "dies-once": fake_model(crash_on_request=1, once=folder / "died"),
        "dies": fake_model(crash_on_request=1),
        "dies-late": fake_model(crash_mid_stream=2),
        "gone": {"path": "nowhere/gone.gguf"},
        "m": fake_model(),
        "aborts-once": fake_model(fail_load="abort", once=folder / "aborted"),
        "aborts": fake_model(fail_load="abort"),
    }
    pool = {"size": 16, "port_start": free_pool(16)}
    settings = {"max_body_mb": 1, "default_model": "m", "server_pool": pool}
    with running(folder, models, **settings) as proxy:
        yield proxy


# --- loading ---------------------------------------------------------------------------------


def test_many_waiting_requests_cause_one_load_and_are_all_answered(shared: Proxy) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: shared.chat("waited-for"), range(12)))
        assert [a.status_code for a in answers] == [200] * 12
        assert starts(shared, "waited-for") == 1
        assert demands_for(shared, "waited-for") == []


def test_loaded_models_are_served_while_another_loads(tmp_path: Path) -> None:
    models = {"quick": fake_model(), "slow": fake_model(silent_load=1)}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(1) as pool:
        assert proxy.chat("quick").status_code == 200
        waiting = pool.submit(proxy.chat, "slow")
        wait_state(proxy, "slow", "starting")
        assert proxy.chat("quick").status_code == 200
        assert proxy.rows("SELECT model, requests, state FROM loads") == [
            {"model": "slow", "requests": 1, "state": "starting"}
        ]
        proxy.stop()
        assert waiting.result().json()["error"]["code"] == "shutting_down"


def test_a_failed_load_is_answered_with_its_log_line_and_not_retried_blindly(shared: Proxy) -> None:
    first, second = shared.chat("too-big"), shared.chat("too-big")
    assert (first.status_code, code_of(first)) == (503, "model_load_failed")
    assert "out of memory" in first.json()["error"]["message"]
    assert second.json() == first.json()
    assert starts(shared, "too-big") == 1
    health = shared.health()
    assert health["status"] == "degraded"
    assert any("out of memory" in reason for reason in health["reasons"])
    (server,) = (one for one in health["servers"] if one["model_id"] == "too-big")
    assert server["status"] == "error"


def test_a_load_without_progress_ends_at_the_stall_timeout(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(silent_load=1)}, load_stall_timeout=1) as proxy:
        answer = proxy.chat("m")
        assert (answer.status_code, code_of(answer)) == (504, "load_timeout")
        assert proxy.llama_servers() == []


def test_a_stream_that_waits_long_gets_comments_before_its_events(tmp_path: Path) -> None:
    models = {"m": fake_model(load_s=1.5)}
    with running(tmp_path, models, sse_wait_comment_after=0.2) as proxy:
        lines = [line for line in proxy.chat("m", stream=True).iter_lines() if line]
        assert lines[0].startswith(b":")
        assert lines[-1] == b"data: [DONE]"


def test_a_taken_port_is_stepped_over(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        taken = free_pool(2)
        stranger.bind(("127.0.0.1", taken))
        stranger.listen()
        pool = {"size": 2, "port_start": taken}
        with running(tmp_path, {"m": fake_model()}, server_pool=pool) as proxy:
            assert proxy.chat("m").status_code == 200
            assert proxy.rows("SELECT port FROM servers")[0]["port"] > taken


# --- making room -----------------------------------------------------------------------------


def small_pool(tmp_path: Path, models: dict, size: int, **settings):
    pool = {"size": size, "port_start": free_pool(size)}
    return running(tmp_path, models, server_pool=pool, min_residency=0, **settings)


def test_the_least_recently_used_idle_model_makes_room(tmp_path: Path) -> None:
    models = {name: fake_model() for name in "abc"}
    with small_pool(tmp_path, models, 2) as proxy:
        for name in "abac":
            assert proxy.chat(name).status_code == 200
        assert proxy.states() == {"a": "ready", "b": "stopped", "c": "ready"}


def test_a_pinned_model_stays(tmp_path: Path) -> None:
    models = {"a": {**fake_model(), "pinned": True}, "b": fake_model(), "c": fake_model()}
    with small_pool(tmp_path, models, 2) as proxy:
        for name in "abc":
            assert proxy.chat(name).status_code == 200
        assert proxy.states() == {"a": "ready", "b": "stopped", "c": "ready"}


def test_a_busy_model_is_never_stopped_and_who_waits_gets_its_turn(tmp_path: Path) -> None:
    models = {"a": fake_model(), "b": fake_model()}
    with small_pool(tmp_path, models, 1) as proxy, ThreadPoolExecutor(1) as pool:
        stream = Streaming(proxy, "a", chunks=100)
        waiting = pool.submit(proxy.chat, "b")
        wait_until(lambda: proxy.rows("SELECT 1 FROM loads WHERE model = 'b'"), what="b waits")
        rest = [line for line in stream.lines if line]
        assert rest[-1] == b"data: [DONE]"
        assert waiting.result().status_code == 200
        assert proxy.states() == {"a": "stopped", "b": "ready"}


def test_a_busy_pool_is_an_error_only_after_the_queue_timeout(tmp_path: Path) -> None:
    models = {"a": fake_model(), "b": fake_model()}
    with small_pool(tmp_path, models, 1, queue_timeout=1) as proxy:
        stream = Streaming(proxy, "a")
        answer = proxy.chat("b")
        assert (answer.status_code, code_of(answer)) == (503, "pool_busy")
        assert int(answer.headers["Retry-After"]) > 0
        assert proxy.states()["a"] in ("ready", "draining")
        stream.close()


def test_a_full_queue_is_said_at_once(tmp_path: Path) -> None:
    models = {"a": fake_model(silent_load=1)}
    with running(tmp_path, models, max_queue=2) as proxy, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(proxy.chat, "a") for _ in range(2)]
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 2, what="two wait")
        answer = proxy.chat("a")
        assert (answer.status_code, code_of(answer)) == (429, "queue_full")
        proxy.stop()
        assert [w.result().status_code for w in waiting] == [503, 503]


def test_an_idle_model_is_unloaded_after_its_ttl_and_loaded_again(tmp_path: Path) -> None:
    with running(tmp_path, {"m": {**fake_model(), "ttl": 1}}) as proxy:
        assert proxy.chat("m").status_code == 200
        wait_state(proxy, "m", "stopped")
        assert proxy.llama_servers() == []
        assert proxy.chat("m").status_code == 200


def test_preload_loads_at_start(tmp_path: Path) -> None:
    with running(tmp_path, {"m": {**fake_model(), "preload": True}}) as proxy:
        wait_state(proxy, "m", "ready")


def test_load_and_unload_by_api(shared: Proxy) -> None:
    loaded = shared.post("/api/models/org/m/load", timeout_s=30)
    assert (loaded.status_code, loaded.json()["status"]) == (200, "ready")
    unloaded = shared.post("/api/models/org/m/unload", timeout_s=30)
    assert (unloaded.status_code, unloaded.json()["status"]) == (200, "unloaded")
    assert servers_of(shared, "org/m") == []


def test_unloading_waits_for_requests_in_flight(shared: Proxy) -> None:
    with ThreadPoolExecutor(1) as pool:
        stream = Streaming(shared, "unloaded", chunks=60)
        done = pool.submit(shared.post, "/api/models/unloaded/unload", timeout_s=30)
        wait_state(shared, "unloaded", "draining")
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert done.result().status_code == 200


def test_a_server_that_ignores_term_is_killed_in_the_end(shared: Proxy) -> None:
    assert shared.chat("stubborn").status_code == 200
    shared.post("/api/models/stubborn/unload", timeout_s=30)
    assert "killed" in reason_of(shared, "stubborn")
    assert servers_of(shared, "stubborn") == []


# --- clients that go -------------------------------------------------------------------------


def test_a_client_that_goes_while_loading_leaves_the_queue(shared: Proxy) -> None:
    client = socket.create_connection(("127.0.0.1", shared.port))
    body = json.dumps({"model": "never", "messages": []}).encode()
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    wait_until(lambda: demands_for(shared, "never"), what="it waits")
    client.close()
    wait_until(
        lambda: not demands_for(shared, "never"),
        what="it left the queue",
    )


def test_a_client_that_goes_frees_its_slot(shared: Proxy) -> None:
    stream = Streaming(shared, "left")
    row = shared.rows("SELECT port, api_key FROM servers WHERE model_id = 'left'")[0]

    def busy() -> int:
        slots = requests.get(
            f"http://127.0.0.1:{row['port']}/slots",
            headers={"Authorization": f"Bearer {row['api_key']}"},
            timeout=5,
        ).json()
        return sum(slot["is_processing"] for slot in slots)

    assert busy() == 1
    stream.close()
    wait_until(lambda: busy() == 0, what="the slot is free")
    wait_until(lambda: not shared.rows("SELECT 1 FROM leases WHERE in_flight"), what="no lease")


# --- surviving -------------------------------------------------------------------------------


def test_a_killed_llama_server_is_noticed_and_its_model_loaded_again(shared: Proxy) -> None:
    assert shared.chat("killed").status_code == 200
    servers_of(shared, "killed")[0].kill()
    wait_state(shared, "killed", "failed")
    assert "SIGKILL" in reason_of(shared, "killed")
    assert shared.chat("killed").status_code == 200


def test_a_server_that_dies_on_a_request_is_replaced_and_the_request_answered(
    shared: Proxy,
) -> None:
    assert shared.chat("dies-once").status_code == 200
    assert starts(shared, "dies-once") == 2


def test_a_server_that_always_dies_on_a_request_is_a_502(shared: Proxy) -> None:
    answer = shared.chat("dies")
    assert (answer.status_code, code_of(answer)) == (502, "backend_failed")
    assert starts(shared, "dies ") == 2


def test_a_server_that_dies_in_a_stream_ends_it_with_an_error_event(shared: Proxy) -> None:
    answer = shared.chat("dies-late", stream=True, max_tokens=50)
    lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["code"] == "backend_failed"


def test_a_killed_manager_is_replaced_and_its_servers_adopted(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(), "n": fake_model()}) as proxy:
        stream = Streaming(proxy, "m")
        server, old = proxy.llama_servers()[0].pid, proxy.manager_pid()
        os.kill(old, signal.SIGKILL)
        assert proxy.chat("m").status_code == 200  # loaded models need no manager
        assert proxy.chat("n").status_code == 200  # and the others wait for the next one
        assert proxy.manager_pid() != old
        assert next(stream.lines) is not None
        stream.close()
        assert server in [each.pid for each in proxy.llama_servers()]
        assert starts(proxy) == 2


def test_a_killed_gunicorn_is_replaced_without_a_refused_connection(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.process is not None
        serve = psutil.Process(proxy.process.pid)
        master = next(c for c in serve.children() if "gunicorn" in " ".join(c.cmdline()))
        workers = master.children()
        master.kill()
        assert proxy.chat("m").status_code == 200
        psutil.wait_procs(workers, timeout=30)
        assert proxy.chat("m").status_code == 200


def test_a_killed_worker_pins_nothing(tmp_path: Path) -> None:
    models = {"a": fake_model(), "b": fake_model()}
    with small_pool(tmp_path, models, 1) as proxy:
        stream = Streaming(proxy, "a")
        holder = proxy.rows("SELECT worker_id FROM leases WHERE in_flight")[0]["worker_id"]
        os.kill(int(holder.partition(":")[0]), signal.SIGKILL)
        assert proxy.chat("b").status_code == 200
        stream.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_serve_whatever_ends_it(tmp_path: Path, number: int) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.process is not None
        family = psutil.Process(proxy.process.pid).children(recursive=True)
        family += proxy.llama_servers()
        proxy.process.send_signal(number)
        proxy.process.wait(60)
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == []
        if number != signal.SIGKILL:
            assert proxy.process.returncode == 0


def test_nothing_outlives_serve_even_when_the_manager_is_killed_first(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        assert proxy.process is not None
        family = psutil.Process(proxy.process.pid).children(recursive=True)
        family += proxy.llama_servers()
        os.kill(proxy.process.pid, signal.SIGSTOP)  # it can't start another manager now
        os.kill(proxy.manager_pid(), signal.SIGKILL)
        proxy.process.kill()
        proxy.process.wait(60)
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == []


def test_a_lost_state_file_is_made_anew_and_running_servers_found(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        server, old = proxy.llama_servers()[0].pid, proxy.manager_pid()
        for part in proxy.state_dir.glob("state.db*"):
            part.unlink()
        wait_until(lambda: proxy.health()["manager"].get("pid") not in (None, old), what="anew")
        wait_until(lambda: proxy.states().get("m") == "ready", what="found")
        assert proxy.chat("m").status_code == 200
        assert [each.pid for each in proxy.llama_servers()] == [server]


def test_the_halves_run_by_themselves(tmp_path: Path) -> None:
    port = free_port()
    proxy = Proxy(tmp_path, {"m": fake_model()}, port=port)
    assert proxy.port != port  # the configuration's address is the one to listen on
    proxy.url = f"http://127.0.0.1:{port}"
    env = {**os.environ, "SMARTPROXY_CONFIG": str(proxy.config_path)}
    root = ROOT
    python = Path(os.sys.executable)  # type: ignore[attr-defined]
    manager = subprocess.Popen([python, "-m", "smartproxy.cli", "manager"], env=env, cwd=root)
    gunicorn = subprocess.Popen(
        [python, "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py", "wsgi:app"],
        env=env,
        cwd=root,
    )
    proxy.process = gunicorn
    try:
        wait_until(lambda: proxy.health().get("manager", {}).get("alive"), what="both up")
        assert proxy.chat("m").status_code == 200
        manager.send_signal(signal.SIGINT)  # as Ctrl-C; SIGTERM would keep its servers
        assert manager.wait(60) == 0
        assert proxy.llama_servers() == []
        assert proxy.health()["status"] == "degraded"
    finally:
        for half in (gunicorn, manager):
            half.terminate()
            half.wait(60)


# --- the state file and the errors -----------------------------------------------------------


def test_the_state_file_is_readable_by_its_owner_only(shared: Proxy) -> None:
    for path in shared.state_dir.glob("state.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_llama_servers_get_none_of_our_stray_variables_and_listen_on_loopback(
    tmp_path: Path,
) -> None:
    stray = {"LLAMA_ARG_CTX_SIZE": "77", "GGML_CUDA_DEVICES": "4", "CUDA_LAUNCH_BLOCKING": "1"}
    with running(tmp_path, {"m": fake_model()}, env=stray) as proxy:
        assert proxy.chat("m").status_code == 200
        child = proxy.llama_servers()[0]
        assert not stray.keys() & child.environ().keys()
        argv = child.cmdline()
        assert argv[argv.index("--host") + 1] == "127.0.0.1"
        assert child.environ()["LLAMA_API_KEY"] not in " ".join(argv)


def test_errors_are_those_of_the_contract(tmp_path: Path) -> None:
    with running(tmp_path, {"model-a": fake_model()}, max_body_mb=1) as proxy:
        chat = f"{proxy.url}/v1/chat/completions"
        missing = {"path": "nowhere.gguf"}
        cases = [
            (requests.post(chat, data=b"{nope", timeout=9), 400, "invalid_json"),
            (requests.post(chat, data=b"[1]", timeout=9), 400, "invalid_json"),
            (requests.post(chat, json={"messages": []}, timeout=9), 400, "model_required"),
            (requests.post(chat, json={"model": "modl-a"}, timeout=9), 404, "model_not_found"),
            (requests.post(chat, data=b"x" * (2 << 20), timeout=9), 413, "request_too_large"),
            (requests.get(f"{proxy.url}/nope", timeout=9), 404, "not_found"),
            (requests.get(f"{proxy.url}/upstream/zzz/props", timeout=9), 404, "model_not_found"),
            (proxy.post("/api/models/model-a/x", timeout_s=9), 404, "not_found"),
        ]
        for answer, status, code in cases:
            assert (answer.status_code, code_of(answer)) == (status, code)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "model-a" in cases[3][0].json()["error"]["message"]
        assert missing["path"] not in proxy.log()


def test_pages_of_allowed_origins_may_read_our_own_answers(tmp_path: Path) -> None:
    origin = {"Origin": PAGE}
    with running(tmp_path, {"m": fake_model()}, allowed_origins=[PAGE]) as proxy:
        for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/models"), ("GET", "/nope")):
            answer = requests.request(method, proxy.url + path, headers=origin, timeout=9)
            assert answer.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        body = b"\xef\xbb\xbf" + json.dumps({"model": "m", "messages": []}).encode()
        chat = f"{proxy.url}/v1/chat/completions"
        assert requests.post(chat, data=body, timeout=30).status_code == 200


def test_keys_of_clients_and_of_operators(tmp_path: Path) -> None:
    keys = {"api_keys": ["client-key"], "admin_keys": ["admin-key"]}
    with running(tmp_path, {"m": fake_model()}, **keys) as proxy:

        def status(method: str, path: str, key: str | None) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            body = {"model": "m", "messages": []} if method == "POST" else None
            answer = requests.request(
                method, proxy.url + path, json=body, headers=headers, timeout=30
            )
            return answer.status_code

        assert status("POST", "/v1/chat/completions", None) == 401
        assert status("POST", "/v1/chat/completions", "wrong") == 401
        assert status("POST", "/v1/chat/completions", "client-key") == 200
        assert status("GET", "/v1/models", None) == 401
        assert status("GET", "/health", None) == 200
        assert status("POST", "/api/models/m/unload", "client-key") == 401
        assert status("POST", "/api/models/m/unload", "admin-key") == 200


def test_a_missing_model_file_is_a_clear_error_and_stops_nobody_else(shared: Proxy) -> None:
    answer = shared.chat("gone")
    assert (answer.status_code, code_of(answer)) == (503, "model_load_failed")
    assert "gone.gguf" in answer.json()["error"]["message"]
    assert shared.chat("m").status_code == 200
    listed = requests.get(f"{shared.url}/v1/models", timeout=9).json()["data"]
    states = {entry["id"]: entry["status"] for entry in listed}
    assert (states["gone"], states["m"]) == ("failed", "ready")


def test_a_request_that_names_no_model_goes_to_the_default(shared: Proxy) -> None:
    answer = requests.post(
        f"{shared.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=30
    )
    assert answer.status_code == 200
    assert answer.json()["model"] == "m"


def test_health_answers_while_every_thread_would_wait_for_a_load(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(silent_load=1)}) as proxy:
        threads = [threading.Thread(target=proxy.chat, args=("m",)) for _ in range(60)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 60, what="all wait")
        began = time.monotonic()
        assert proxy.health()["mode"] == "cpu"
        assert time.monotonic() - began < 5
        proxy.stop()
        for thread in threads:
            thread.join(30)


def test_health_answers_while_operators_wait_for_loads(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(silent_load=1)}) as proxy:
        load = ("/api/models/m/load",)
        threads = [threading.Thread(target=proxy.post, args=load) for _ in range(40)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 40, what="all wait")
        assert proxy.health()["mode"] == "cpu"
        proxy.stop()
        for thread in threads:
            thread.join(30)


def test_loads_by_api_count_in_the_queue_and_end_with_their_caller(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(silent_load=1)}, max_queue=3) as proxy:
        ask = b"POST /api/models/m/load HTTP/1.1\r\nHost: localhost\r\nX-Requested-With: x\r\n\r\n"
        callers = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(3)]
        for caller in callers:
            caller.sendall(ask)
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 3, what="all wait")
        answer = proxy.post("/api/models/m/load")
        assert (answer.status_code, code_of(answer)) == (429, "queue_full")
        for caller in callers:
            caller.close()
        wait_until(lambda: not proxy.rows("SELECT 1 FROM demands"), what="they left the queue")


def test_a_stop_lets_streams_finish_and_sends_away_who_waits(tmp_path: Path) -> None:
    models = {"m": fake_model(), "slow": fake_model(silent_load=1)}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(2) as pool:
        stream = Streaming(proxy, "m", chunks=100)
        waiting = pool.submit(proxy.chat, "slow")
        asked = pool.submit(proxy.post, "/api/models/slow/load")
        wait_until(lambda: len(proxy.rows("SELECT 1 FROM demands")) == 2, what="both wait")
        assert proxy.process
        proxy.process.terminate()
        for refused in (waiting.result(), asked.result()):
            assert (refused.status_code, code_of(refused)) == (503, "shutting_down")
            assert refused.headers["Retry-After"]
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert proxy.process.wait(60) == 0


def test_the_log_is_one_line_an_event_from_every_process(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        assert proxy.chat("m").status_code == 200
        proxy.stop()
        lines = proxy.log().splitlines()
        assert any("smartproxy.state.events" in line for line in lines)
        assert any("gunicorn.error" in line for line in lines)
        shape = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+[+-]\d\d:\d\d (INFO|WARNING|ERROR) [\w.]+ \S")
        assert [line for line in lines if not shape.match(line)] == []


def test_who_only_waits_carries_nothing_of_the_others(shared: Proxy) -> None:
    assert shared.process
    loaded = Path(f"/proc/{shared.process.pid}/maps").read_text()
    assert "pydantic_core" in loaded  # the configuration; else this looks in the wrong place
    assert "numpy" not in loaded
    assert "orjson" not in loaded


def test_the_port_must_not_be_one_of_the_servers(tmp_path: Path) -> None:
    proxy = Proxy(tmp_path, {"m": fake_model()})
    first = json.loads(proxy.config_path.read_text())["server_pool"]["port_start"]
    argv = [os.sys.executable, "-m", "smartproxy.cli", "serve"]  # type: ignore[attr-defined]
    argv += ["--config", str(proxy.config_path), "--port", str(first + 1)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"{first + 1} is one of the servers' ports" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_killed_while_loading_is_started_once_more(shared: Proxy) -> None:
    assert shared.chat("aborts-once").status_code == 200
    answer = shared.chat("aborts")
    assert (answer.status_code, code_of(answer)) == (503, "model_load_failed")
    assert (starts(shared, "aborts-once "), starts(shared, "aborts ")) == (1, 1)
    assert shared.log().count("is started once more") == 2
