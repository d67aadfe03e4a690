"""The stand-in as a server: from its command line to its end."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading

from tests.support.fakes.stand_in import process
from tests.support.fakes.stand_in.api import Api, Settings, model_file_problem
from tests.support.fakes.stand_in.engine import Engine, Stopping
from tests.support.fakes.stand_in.flags import BadFlag, Options, parse
from tests.support.fakes.stand_in.http import Connection, Gone
from tests.support.fakes.stand_in.journal import Journal
from tests.support.fakes.stand_in.knobs import KnobError, parse_knobs
from tests.support.fakes.stand_in.memory import GpuMemory, OutOfMemory, used_devices

DEFAULT_CONTEXT_SIZE = 8192


def run(argv: list[str]) -> int:
    """Serve until told to stop; returns the exit status."""
    try:
        options = parse(argv)
        knobs = parse_knobs(options.knobs)
        memory = GpuMemory(
            devices=used_devices(options),
            tensor_split=options.text("--tensor-split"),
            knobs=knobs,
        )
    except (BadFlag, KnobError) as error:
        print(error, file=sys.stderr)
        return 1
    journal = Journal(knobs.journal)
    journal.write("started", argv=sys.argv, env=dict(os.environ), cwd=os.getcwd())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(knobs.life_s)
    return serve(options, memory, journal)


def serve(options: Options, memory: GpuMemory, journal: Journal) -> int:
    """Open the port, load, answer until told to stop; returns the exit status."""
    knobs = memory.knobs
    signals = process.Signals(knobs, journal)
    if knobs.ignore_term:
        signals.listen()
    api = Api(_settings(options), _engine(options), knobs, journal)
    api.crash = lambda: process.crash(knobs, journal)
    api.request_memory = lambda difference: _request_memory(api, memory, difference)
    listener = _bind(options.text("--host", "127.0.0.1"), options.number("--port", 8080))
    if listener is None:
        journal.write("exit", status=1)
        return 1
    limit = options.number("--threads-http", -1)
    limit = knobs.http_threads or max(limit, 0)
    threading.Thread(target=_accept, args=(listener, api, limit), daemon=True).start()

    path = api.settings.model_path
    process.log("I", f"srv    load_model: loading model '{path}'")
    if problem := model_file_problem(path):
        text = f"llama_model_load: error loading model: failed to load model from {path}"
        process.fail_to_load(journal, [f"gguf_init_from_file: {problem}", text])
    process.load(knobs, memory, journal, options.number("--verbosity", 3) >= 4)
    signals.listen()
    _announce(api, listener)
    if knobs.crash_after_ready_s >= 0 and knobs.misbehaves():
        threading.Timer(knobs.crash_after_ready_s, api.crash).start()
    signals.wait()
    listener.shutdown(socket.SHUT_RDWR)  # close alone leaves it open under a blocked accept
    listener.close()
    status = signals.end(api.engine)
    process.leave(journal, status)
    return status


def _settings(options: Options) -> Settings:
    path = options.text("--model")
    keys = options.text("--api-key") or os.environ.get("LLAMA_API_KEY", "")
    return Settings(
        alias=options.text("--alias") or path,
        model_path=path,
        api_keys=frozenset(key for key in keys.split(",") if key),
        metrics=options.on("--metrics"),
        slots=options.on("--slots", True),
        embedding=options.on("--embedding"),
        reranking=options.on("--reranking"),
    )


def _engine(options: Options) -> Engine:
    """Divide the context as llama-server does: not with the automatic 4 slots, nor unified."""
    slots = options.number("--parallel", -1)
    unified = options.on("--kv-unified", slots < 0)
    slots = 4 if slots < 0 else slots
    context = options.number("--ctx-size", 0) or DEFAULT_CONTEXT_SIZE
    return Engine(slots, context if unified else context // slots)


def _bind(host: str, port: int) -> socket.socket | None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        start = "srv         start: couldn't bind HTTP server socket"
        process.log("E", f"{start}, hostname: {host}, port: {port}")
        process.log("E", "srv  llama_server: exiting due to HTTP server error")
        return None
    listener.listen(512)
    return listener


def _accept(listener: socket.socket, api: Api, limit: int) -> None:
    """Give every connection a thread, at most `limit` at a time (0: any number)."""
    places = threading.Semaphore(limit or 1 << 20)
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve_connection, args=(sock, api, places), daemon=True).start()


def _serve_connection(sock: socket.socket, api: Api, places: threading.Semaphore) -> None:
    with places:
        connection = Connection(sock, api.knobs.keepalive_s)
        try:
            while not connection.closing:
                request = connection.read_request()
                try:
                    api.handle(connection, request)
                except Gone:
                    api.journal.write("cancelled", path=request.target)
                    raise
        except Gone:
            pass
        except Stopping:
            threading.Event().wait()  # the client hears nothing until the process ends
        connection.close()


def _announce(api: Api, listener: socket.socket) -> None:
    slots = api.engine.slots
    host, port = listener.getsockname()[:2]
    shape = f"n_slots = {len(slots)}, n_ctx_slot = {slots[0].context_size}"
    process.log("I", f"srv    load_model: initializing, {shape}")
    process.log("I", "srv  llama_server: model loaded")
    process.log("I", f"srv  llama_server: listening on http://{host}:{port}")
    api.ready.set()
    api.journal.write("ready", port=port)


def _request_memory(api: Api, memory: GpuMemory, difference: int) -> None:
    """A CUDA allocation that fails while running aborts the process."""
    try:
        memory.request(difference)
    except OutOfMemory:
        api.crash()
