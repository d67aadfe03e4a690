"""Whether a load died for want of memory, whose, and how much was asked: read off its log. Pure.

Messages as b10068 prints them (Vulkan and host: seen here on the software GPU and under a memory
limit) and as ggml-cuda.cu, llama-model.cpp, llama-kv-cache.cpp and llama-context.cpp of b11434
write them; HIP and MUSA builds share ggml-cuda's text with their own function's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from smartproxy.llama.buffer_lines import measured_buffers
from smartproxy.types import MIB


class Lacking(StrEnum):
    """Whose memory was short."""

    GPU = "GPU"
    HOST = "host"


#: warnings that sound alike: without pinned memory a server only transfers more slowly
_HARMLESS = re.compile(r"pinned memory|retrying without pipeline parallelism", re.I)
_GPU = re.compile(
    r"(?:cuda|hip|musa)Malloc\w* failed: out of memory|(?:CUDA|ROCm|MUSA) error: out of memory"
    r"|Device memory allocation of size \d+ failed|ErrorOutOfDeviceMemory"
    r"|Requested buffer size exceeds device buffer size limit"
    r"|(?:failed|unable) to allocate (?!CPU)[A-Z]\w+ buffer"
)
_HOST = re.compile(
    r"ggml_aligned_malloc: insufficient memory|mmap failed: Cannot allocate memory"
    r"|cpu_buffer_type_alloc_buffer: failed to allocate buffer|failed to allocate CPU\w* buffer"
    r"|unable to allocate CPU\w* buffer|ErrorOutOfHostMemory|std::bad_alloc"
)
#: these follow either kind; alone they are the GPU's, which is where caches and graphs lie
_EITHER = re.compile(
    r"failed to allocate buffer for (?:kv|rs) cache|failed to allocate compute (?:\w+ )?buffers"
)
_ASKED = re.compile(r"allocating ([\d.]+) MiB on device (\d+): \w+ failed: out of memory")


def lacking(log: str) -> Lacking | None:
    """Return whose memory was short when this server died, None where that was not the reason."""
    lines = [line for line in log.splitlines() if not _HARMLESS.search(line)]
    for pattern, kind in ((_GPU, Lacking.GPU), (_HOST, Lacking.HOST), (_EITHER, Lacking.GPU)):
        if any(pattern.search(line) for line in lines):
            return kind
    return None


def asked_bytes(log: str, device_count: int) -> Sequence[int]:
    """Return by device the buffers that were had, and on the one that failed what was asked too.

    0 where the log does not say (only CUDA names the device). Without overhead: a lower bound of
    what the model needs there.
    """
    had = measured_buffers(log.splitlines())
    totals = [0] * device_count
    for size, device in _ASKED.findall(log):
        place = int(device)
        if place < device_count:
            known = next(
                (had[name] for name in had if re.fullmatch(rf"[A-Z]\w*?{place}", name)), None
            )
            buffers = known.buffers_bytes if known else 0
            totals[place] = max(totals[place], buffers + round(float(size) * MIB))
    return totals
