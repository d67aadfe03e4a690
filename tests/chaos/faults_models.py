"""Model files, the configuration, ports: what others do to the files and sockets we rely on."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from tests.chaos.fault import SERVER_DIED, Faulty, Scene, fault
from tests.chaos.load import chat, operation
from tests.chaos.machine import HOME, OTHERS

FAILED = frozenset({"model_load_failed"})
#: GGUF: magic, version 3, no tensors, one key
HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
STRING, ARRAY, U8 = 8, 9, 0


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _liars() -> dict[str, bytes]:
    """Return headers that promise what no file holds."""
    key = _text(b"general.architecture")
    return {
        "huge-string": HEAD + key + struct.pack("<IQ", STRING, 200_000_000_000),
        "huge-key": HEAD + struct.pack("<Q", 1 << 62),
        "huge-array": HEAD + key + struct.pack("<IIQ", ARRAY, U8, 1 << 60),
        "many-strings": HEAD
        + key
        + struct.pack("<IIQ", ARRAY, STRING, 3_000_000)
        + bytes(24 << 20),
        "many-keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + key,
        "nested": HEAD + key + struct.pack("<IIQ", ARRAY, ARRAY, 1) * 2000,
        "empty": b"",
        "no-gguf": b"something else" * 100,
    }


@fault("files appear that lie about their size", FAILED, hold_s=(1.0, 2.0))
def liars(scene: Scene) -> Faulty:
    folder = scene.machine.models_dir
    for name, data in _liars().items():
        (folder / f"{name}.gguf").write_bytes(data)
    # a running proxy does not look into the folder again: its configured models' files change
    for name, data in _liars().items():
        with _other_file(scene, "lags", data):
            scene.judged(
                "plain", "lags", chat("lags"), "ok", "model_load_failed", "model_file_missing"
            )
        scene.expect(True, name)
    yield
    for entry in folder.iterdir():
        entry.unlink()
    scene.judged("operation", "lags", operation("lags", "load"), "ok")


class _other_file:  # a context, used as one
    """Put other bytes in the place of a model's file, for a while."""

    def __init__(self, scene: Scene, model: str, data: bytes | None) -> None:
        self._path = _file(scene, model)
        self._kept = self._path.with_suffix(".kept")
        self._data = data
        scene.judged("operation", model, operation(model, "unload"))

    def __enter__(self) -> None:
        os.replace(self._path, self._kept)
        if self._data is not None:
            self._path.write_bytes(self._data)

    def __exit__(self, *exc: object) -> None:
        os.replace(self._kept, self._path)


def _file(scene: Scene, model: str) -> Path:
    (path,) = scene.machine.folder.glob(f"**/{model}.Q8_0*.gguf")
    return path


@fault("a model's file is missing for a while", FAILED, "model_file_missing")
def missing(scene: Scene) -> Faulty:
    with _other_file(scene, "lags", None):
        scene.judged("plain", "lags", chat("lags"), "model_load_failed", "model_file_missing")
    yield
    scene.judged("operation", "lags", operation("lags", "load"), "ok")


@fault("a model's file is a pipe", FAILED, "model_file_missing")
def fifo(scene: Scene) -> Faulty:
    with _other_file(scene, "lags", None):
        path = _file_place(scene, "lags")
        os.mkfifo(path)
        scene.beside(
            lambda: scene.judged(
                "plain", "lags", chat("lags"), "model_load_failed", "model_file_missing"
            )
        )
        yield
        scene.settle(20)
    scene.judged("operation", "lags", operation("lags", "load"), "ok")


def _file_place(scene: Scene, model: str) -> Path:
    (kept,) = scene.machine.folder.glob(f"**/{model}.Q8_0*.kept")
    return kept.with_suffix(".gguf")


@fault("a loaded model's file is touched")
def touched(scene: Scene) -> Faulty:
    os.utime(_file(scene, scene.chooser.choice(list(HOME))))
    yield


@fault("the configuration is changed to something bad, and back", hold_s=(1.0, 2.0))
def bad_configuration(scene: Scene) -> Faulty:
    path = scene.machine.proxy.config_path
    before = path.read_text()
    path.write_text(before[: len(before) // 2])
    yield
    path.write_text(before)


@fault("ports of the pool are taken by others", hold_s=(0.5, 1.5), weight=2)
def ports_taken(scene: Scene) -> Faulty:
    taken = _take(scene, scene.chooser.sample(list(scene.machine.ports), 8))
    yield
    for sock in taken:
        sock.close()


@fault("all ports of the pool are taken by others", FAILED, hold_s=(1.0, 2.0))
def all_ports_taken(scene: Scene) -> Faulty:
    taken = _take(scene, list(scene.machine.ports))
    yield
    for sock in taken:
        sock.close()
    for model in (*HOME, *OTHERS, "canary"):  # a person's load overrides the back-off
        scene.load.ask("operation", model, operation(model, "load"))


def _take(scene: Scene, ports: list[int]) -> list[socket.socket]:
    taken = []
    for port in ports:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen(1)
        except OSError:
            sock.close()
        else:
            taken.append(sock)
    return taken


@fault("a squatter takes the port of a server that starts", SERVER_DIED, "model_load_failed")
def squatter(scene: Scene) -> Faulty:
    """F13: it binds first, and answers 200 to everything."""
    model = "slow-load"
    scene.judged("operation", model, operation(model, "unload"))
    caught: list[bytes] = []
    ended = time.monotonic() + 3
    scene.beside(lambda: _squat(scene, model, ended, caught))
    scene.judged("plain", model, chat(model), "ok", "model_load_failed")
    yield
    scene.settle(10)
    scene.expect(not any(b"POST" in data for data in caught), "a squatter was given a prompt")
    scene.expect(not any(b"Bearer" in data for data in caught), "a squatter was given a key")


def _squat(scene: Scene, model: str, end: float, caught: list[bytes]) -> None:
    while time.monotonic() < end:
        for row in scene.machine.servers("starting", model=model):
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind(("127.0.0.1", row["port"]))
                except OSError:
                    return  # it came first
                listener.listen(16)
                listener.settimeout(0.1)
                while time.monotonic() < end:
                    try:
                        visitor, _ = listener.accept()
                    except TimeoutError:
                        continue
                    with visitor:
                        visitor.settimeout(0.3)
                        caught.append(visitor.recv(1 << 16))
                        said = b'{"status":"ok","choices":[{"message":{"content":"mine"}}]}'
                        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        length = b"Content-Length: %d\r\n\r\n" % len(said)
                        visitor.sendall(head + length + said)
        time.sleep(0.002)
