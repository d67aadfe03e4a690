"""Read what a server really allocated from its own log. Pure: lines in, bytes out.

Needs log verbosity 4 (`-lv 4`). Builds b10068 to b11434 write the same lines, whatever stands
before them (time stamp, level, function):

    load_tensors:      Vulkan0 model buffer size =    92.10 MiB
    llama_kv_cache:    Vulkan0 KV buffer size =    45.00 MiB
    llama_memory_recurrent:      CUDA0 RS buffer size =    55.37 MiB
    sched_reserve: Vulkan_Host compute buffer size =     4.26 MiB
    llama_context:        CPU  output buffer size =     0.19 MiB

A server that drafts has a second context, which begins with a line of its own; a projector tells
its weights and its graph in other words:

    llama_context: constructing llama_context
    clip_ctx: CLIP using CUDA0 backend
    load_hparams: model size:         52.16 MiB
    reserve_compute_meta:      CUDA0 compute buffer size =    19.32 MiB
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from smartproxy.memory.types import DeviceBytes
from smartproxy.types import MIB

#: the name under which everything that is not a device's is summed
HOST = "host"

_LINE = re.compile(
    r"(?P<who>\w*):\s+(?P<buffer>[\w.\[\]:-]+)\s+(?P<part>model|LoRA|KV|RS|compute|output)"
    r" buffer size =\s*(?P<mebibytes>\d+(?:\.\d+)?) MiB"
)
_NEW_CONTEXT = "constructing llama_context"
_PROJECTOR = re.compile(r"CLIP using (?P<buffer>[\w.\[\]:-]+) backend")
_PROJECTOR_SIZE = re.compile(r"load_hparams: model size:\s*(?P<mebibytes>\d+(?:\.\d+)?) MiB")
_FIELDS = {
    "model": "weights_bytes",
    "LoRA": "weights_bytes",
    "KV": "kv_cache_bytes",
    "RS": "recurrent_bytes",
    # the host reads results from it; the estimate counts it with the graph's host side
    "output": "compute_bytes",
}
#: pinned, mapped and repacked memory is the host's too: CUDA_Host, CPU_Mapped, CPU_REPACK
_HOST_BUFFER = re.compile(r"(CPU|BLAS|AMX)(_.*)?|.*_Host")


def measured_buffers(lines: Iterable[str]) -> Mapping[str, DeviceBytes]:
    """Return bytes by device name ("CUDA0", "RPC0[127.0.0.1:50052]"), and HOST.

    The log rounds to 0.01 MiB. A context's compute buffer is reserved anew in steps: the last size
    counts; the others are printed once per file, cache or model and add up. Empty where the log
    has no such lines. What a draft model and a projector take is summed with the model's own.
    """
    sums: dict[str, dict[str, int]] = {}
    computes: dict[tuple[int, str, str], float] = {}
    contexts, projector = 0, "CPU"
    for line in lines:
        contexts += _NEW_CONTEXT in line
        if named := _PROJECTOR.search(line):
            projector = named["buffer"]
        if sized := _PROJECTOR_SIZE.search(line):
            _add(sums, projector, "weights_bytes", float(sized["mebibytes"]))
        match = _LINE.search(line)
        if match is None:
            continue
        if match["part"] == "compute":
            computes[contexts, match["who"], match["buffer"]] = float(match["mebibytes"])
        else:
            _add(sums, match["buffer"], _FIELDS[match["part"]], float(match["mebibytes"]))
    for (_, _, buffer), mebibytes in computes.items():
        _add(sums, buffer, "compute_bytes", mebibytes)
    return MappingProxyType({name: DeviceBytes(**parts) for name, parts in sums.items()})


def _add(sums: dict[str, dict[str, int]], buffer: str, field: str, mebibytes: float) -> None:
    parts = sums.setdefault(_device(buffer), {})
    parts[field] = parts.get(field, 0) + round(mebibytes * MIB)


def _device(buffer: str) -> str:
    return HOST if _HOST_BUFFER.fullmatch(buffer) else buffer
