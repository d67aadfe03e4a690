"""A child that looks at the GPUs when told: one command a line in, one JSON line out.

`look` answers with the snapshot; `pass SECONDS` moves the observer's clock on; `close` shuts NVML
down; `start` looks in a thread and answers at once, `done` tells whether that look has ended.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict

from smartproxy.gpus.nvml import GpuObserver


def main() -> None:
    now = 0.0
    observer = GpuObserver(clock=lambda: now)
    looking = threading.Thread(target=observer.observe, daemon=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        answer: object = None
        if command == "look":
            answer = asdict(observer.observe())
        elif command == "pass":
            now += float(argument)
        elif command == "close":
            observer.close()
        elif command == "start":
            looking.start()
        elif command == "done":
            answer = not looking.is_alive()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
