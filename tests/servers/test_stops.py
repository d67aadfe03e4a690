"""Starts and stops: who is told to end, what goes on meanwhile, and that nobody meets nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

from tests.support.paths import ROOT
from tests.support.running import Proxy, Streaming, fake_model, running, wait_until

FRESH = {"Connection": "close"}


def family(proxy: Proxy) -> list[psutil.Process]:
    assert proxy.process is not None
    return [*psutil.Process(proxy.process.pid).children(recursive=True), *proxy.llama_servers()]


def gunicorn_of(proxy: Proxy) -> list[psutil.Process]:
    assert proxy.process is not None
    children = psutil.Process(proxy.process.pid).children()
    return [child for child in children if "gunicorn_conf" in " ".join(child.cmdline())]


def manager_is_another(proxy: Proxy, old: int) -> bool:
    manager = proxy.health()["manager"]
    return bool(manager["alive"] and manager["pid"] not in (None, old))


# starting


def test_serve_says_serving_only_when_it_serves(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        wait_until(lambda: "serving on http" in proxy.log(), what="it says so")
        log = proxy.log()
        assert log.index("starting, to serve on http") < log.index("manager up")
        assert log.index("manager up") < log.index("INFO smartproxy.serving.supervisor serving on")


def test_serve_that_can_not_start_never_says_serving(tmp_path: Path) -> None:
    proxy = Proxy(tmp_path, {"m": fake_model()}, llama_server="/bin/false")
    argv = [sys.executable, "-m", "smartproxy.cli", "serve", "--config", str(proxy.config_path)]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "manager.sock").mkdir()  # the manager can't begin with this
    process = subprocess.Popen(
        [*argv, "--port", str(proxy.port)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        wait_until(lambda: requests_answer(proxy), what="a worker answers")
    finally:
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert "starting, to serve on" in told
    assert "serving on" not in told.replace("to serve on", "")


def requests_answer(proxy: Proxy) -> bool:
    try:
        return requests.get(f"{proxy.url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def test_an_address_for_others_without_keys_is_refused_in_one_line(tmp_path: Path) -> None:
    proxy = Proxy(tmp_path, {"m": fake_model()})
    argv = [sys.executable, "-m", "smartproxy.cli", "serve", "--config", str(proxy.config_path)]
    ended = subprocess.run(
        [*argv, "--host", "0.0.0.0", "--port", str(proxy.port)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert "api_keys" in line
    assert '"open_to_network": true' in line


# the manager leaves and comes back


def test_the_managers_term_keeps_the_servers_and_their_streams(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(), "n": fake_model()}) as proxy:
        stream = Streaming(proxy, "m", chunks=150)
        server, old = proxy.llama_servers()[0].pid, proxy.manager_pid()
        os.kill(old, signal.SIGTERM)
        assert proxy.chat("n").status_code == 200  # waits for the next manager
        wait_until(lambda: manager_is_another(proxy, old), what="another manager")
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert server in [each.pid for each in proxy.llama_servers()]
        assert proxy.states() == {"m": "ready", "n": "ready"}
        assert f"adopted server 1 pid={server}" in proxy.log()


def test_a_manager_that_watches_a_load_leaves_at_once(tmp_path: Path) -> None:
    models = {"m": fake_model(load_s=3)}
    with running(tmp_path, models) as proxy, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(proxy.chat, "m")
        wait_until(lambda: proxy.rows("SELECT 1 FROM servers WHERE pid"), what="it loads")
        old = proxy.manager_pid()
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(old), what="it left")
        assert proxy.states()["m"] == "starting"
        assert waiting.result().status_code == 200
        assert len(proxy.rows("SELECT id FROM servers")) == 1


def test_a_reload_signal_ends_nobody(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        stream = Streaming(proxy, "m", chunks=100)
        pids = {each.pid for each in family(proxy)}
        assert proxy.process is not None
        wait_until(lambda: "serving on" in proxy.log(), what="all up")
        proxy.process.send_signal(signal.SIGHUP)
        os.kill(proxy.manager_pid(), signal.SIGHUP)
        wait_until(lambda: proxy.log().count("not read again yet") >= 1, what="it is said")
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert {each.pid for each in family(proxy)} == pids


# stopping


def test_who_comes_while_serve_stops_is_told_so_at_once(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        stream = Streaming(proxy, "m", chunks=250)
        assert proxy.process is not None
        proxy.process.terminate()
        wait_until(lambda: health_code(proxy) == 503, what="it is told")
        for _ in range(20):
            answer = proxy.chat("m")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
            assert answer.headers["X-Smartproxy-Error"] == "shutting_down"
            assert answer.headers["Retry-After"]
        told = "waiting for 1 requests on model 'm', at most"
        wait_until(lambda: told in proxy.log(), what="the log says what is waited for")
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert proxy.process.wait(60) == 0


def health_code(proxy: Proxy) -> int:
    return requests.get(f"{proxy.url}/health", headers=FRESH, timeout=5).status_code


def test_a_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(ignore_term=2)}) as proxy:
        stream = Streaming(proxy, "m")
        everybody = family(proxy)
        assert proxy.process is not None
        proxy.process.terminate()
        wait_until(lambda: health_code(proxy) == 503, what="it stops")
        proxy.process.send_signal(signal.SIGINT)
        # streams would go on for 30 s, and servers that ignore TERM for 7 more
        assert proxy.process.wait(25) == 0
        assert psutil.wait_procs(everybody, timeout=5)[1] == []
        stream.close()


def test_another_gunicorn_takes_over_while_the_old_one_finishes(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        stream = Streaming(proxy, "m", chunks=250)
        (old,) = gunicorn_of(proxy)
        old.terminate()
        wait_until(lambda: len(gunicorn_of(proxy)) == 2, what="two of them")
        assert proxy.chat("m").status_code == 200
        assert old.is_running()
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        psutil.wait_procs([old], timeout=30)
        assert proxy.chat("m").status_code == 200
        assert len(gunicorn_of(proxy)) == 1
        assert "shutting_down" not in proxy.log()


def test_serve_and_manager_killed_together_the_next_ones_take_over(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model(), "n": fake_model()}) as proxy:
        stream = Streaming(proxy, "m")
        server, old = proxy.llama_servers()[0].pid, proxy.manager_pid()
        assert proxy.process is not None
        os.kill(proxy.process.pid, signal.SIGSTOP)  # else it might start another manager
        os.kill(old, signal.SIGKILL)
        proxy.process.kill()
        proxy.process.wait(60)
        proxy.start()
        # the old gunicorn may still answer /health while it ends
        wait_until(lambda: proxy.log().count("supervisor serving on") == 2, what="it serves")
        assert proxy.chat("m").status_code == 200
        assert proxy.chat("n").status_code == 200
        assert server in [each.pid for each in proxy.llama_servers()]
        assert next(stream.lines) is not None
        assert "shutting_down" not in proxy.log()
        stream.close()


def test_a_guard_without_successor_lets_streams_finish(tmp_path: Path) -> None:
    with running(tmp_path, {"m": fake_model()}) as proxy:
        stream = Streaming(proxy, "m", chunks=150)
        everybody = family(proxy)
        assert proxy.process is not None
        os.kill(proxy.process.pid, signal.SIGSTOP)
        os.kill(proxy.manager_pid(), signal.SIGKILL)
        proxy.process.kill()
        proxy.process.wait(60)
        assert [line for line in stream.lines if line][-1] == b"data: [DONE]"
        assert psutil.wait_procs(everybody, timeout=60)[1] == []


# a manager that hangs


def hangs(proxy: Proxy) -> bool:
    reasons = proxy.health().get("reasons", [])
    return any("loop stands" in reason or "gave no sign" in reason for reason in reasons)


def replaced_with_its_stream_going_on(proxy: Proxy, old: int, stream: Streaming) -> None:
    server = proxy.llama_servers()[0].pid
    wait_until(lambda: hangs(proxy), what="/health says so")
    wait_until(lambda: manager_is_another(proxy, old), what="another manager")
    assert "killing it; its llama-servers stay" in proxy.log()
    assert next(stream.lines) is not None
    assert [each.pid for each in proxy.llama_servers()] == [server]
    stream.close()
    assert proxy.chat("m").status_code == 200
    assert proxy.chat("n").status_code == 200


def test_a_stopped_manager_is_replaced_and_its_servers_adopted(tmp_path: Path) -> None:
    models = {"m": fake_model(), "n": fake_model()}
    with running(tmp_path, models, manager_stall_timeout=8) as proxy:
        stream = Streaming(proxy, "m")
        old = proxy.manager_pid()
        os.kill(old, signal.SIGSTOP)
        replaced_with_its_stream_going_on(proxy, old, stream)


def test_a_manager_whose_loop_hangs_is_replaced(tmp_path: Path) -> None:
    models = {"m": fake_model(), "n": fake_model()}
    with running(tmp_path, models, manager_stall_timeout=8) as proxy:
        stream = Streaming(proxy, "m")
        old = proxy.manager_pid()
        stop_main_thread(old)  # the others, and so its heartbeat, go on
        replaced_with_its_stream_going_on(proxy, old, stream)


def stop_main_thread(pid: int) -> None:
    """Stop one thread of a process, as a debugger does."""
    ptrace_attach, wait_for_threads = 16, 0x40000000
    assert ctypes.CDLL(None, use_errno=True).ptrace(ptrace_attach, pid, None, None) == 0

    def reap() -> None:
        """Its end is told to who debugs it first."""
        while os.WIFSTOPPED(os.waitpid(pid, wait_for_threads)[1]):
            pass

    threading.Thread(target=reap, daemon=True).start()
