#!/usr/bin/env -S python3 -S
"""A stand-in llama-server: the real one's manners without a model, and bad manners on request.

Run in place of the binary (configuration key `llama_server`); standard library only, ready in
about 0.1 s. It takes the flags of the real one, opens its port before it "loads" (503 meanwhile),
answers the same routes in the same shapes (real ones are compared in test_fake_llama_server.py),
queues for --parallel slots, counts its tokens, cancels when a client leaves, and ends on SIGTERM
the way the real one does: at once when idle, after 30 s with a request in flight, and at once with
status 1 on the second signal.

Imitated on purpose: /health waits when all HTTP threads are taken (--threads-http); bad JSON gives
500; an explicit --parallel without --kv-unified divides the context; SIGTERM while loading kills.
Not imitated: tokenising (a word is a token, /tokenize gives bytes), sampling, LLAMA_ARG_*.

Bad manners come from a model's `args`: `--fake KEY=VALUE[,KEY=VALUE...]`; all keys stand in
stand_in/knobs.py. The number of tokens is the request's `max_tokens`. With SMARTPROXY_FAKE_NVML in
the environment it takes `gpu_bytes` in that world (world.py) on the GPUs of CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

VERSION = "version: 1 (fa4e5e4)\nbuilt with Python for Linux (stand-in)"


def main(argv: list[str]) -> int:
    """Answer a question, or serve; returns the exit status.

    Questions are asked at every start of a manager: they load no more than they need.
    """
    if {"-h", "--help", "--usage"} & set(argv):
        from tests.support.fakes.stand_in.flags import help_text

        print(help_text())
        return 0
    if "--version" in argv:
        print(VERSION, file=sys.stderr)
        return 0
    if "--list-devices" in argv:
        from tests.support.fakes.stand_in.memory import list_devices

        print(list_devices())
        return 0
    from tests.support.fakes.stand_in.server import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
