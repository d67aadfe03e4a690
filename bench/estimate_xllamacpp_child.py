"""Runs in xllamacpp's own environment: JSON cases on stdin, its estimates in bytes on stdout.

Reads each file once (its reader takes seconds) and says nothing of an own overhead per GPU, so that
what comes out is to be compared with llama.cpp's buffers. null: it gave up on that model.
"""

import functools
import json
import sys

from xllamacpp import memory

#: a GPU on which everything fits
GPU = {"name": "CUDA", "memory_free": 1 << 44, "memory_min": 0}


def main() -> None:
    memory.dump_metadata_json = functools.cache(memory.dump_metadata_json)
    reader, kinds = memory._import_gguf()
    cached = functools.cache(reader)
    memory._import_gguf = lambda: (cached, kinds)
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))


def answer(case: dict) -> int | None:
    try:
        estimate = memory.estimate_gpu_layers(
            [dict(GPU)],
            case["path"],
            [],
            context_length=case["context_size"],
            batch_size=case["ubatch"],
            num_parallel=case["parallel"],
            kv_cache_type=case["cache_type"],
        )
    except Exception as error:  # noqa: BLE001  # a foreign estimator: whatever it fails with
        print(f"{case['path']}: {error!r}", file=sys.stderr)
        return None
    return int(estimate.vram_size)


if __name__ == "__main__":
    main()
