"""What a model needs of memory, as plain values: header, settings, layout, estimate. No I/O.

Bytes are integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is laid over devices: what the launcher passes and the estimate speaks of."""

    #: one share per device in device order; (1.0,) for one GPU, () for the CPU alone
    tensor_split: tuple[float, ...]
    #: layers on the devices, the output layer counted: 0 .. layer_count
    gpu_layers: int
    #: tokens of the server, all slots together
    context_size: int
    #: the first N layers' expert weights stay on the host
    cpu_moe_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBytes:
    """What one device (or the host) is asked for."""

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0
    #: context of the backend, libraries, pools: per GPU, learned; not part of llama.cpp's buffers
    overhead_bytes: int = 0

    @property
    def buffers_bytes(self) -> int:
        """Without overhead: what llama.cpp's own buffer lines add up to."""
        return self.weights_bytes + self.kv_cache_bytes + self.recurrent_bytes + self.compute_bytes

    @property
    def total_bytes(self) -> int:
        return self.buffers_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted bytes of one model in one layout."""

    layout: Layout
    #: one entry per share of layout.tensor_split
    devices: tuple[DeviceBytes, ...]
    host: DeviceBytes
    #: False where the architecture is unknown and the numbers are deliberately high
    confident: bool = True

    @property
    def total_bytes(self) -> int:
        """Over all devices, overhead included; host not included."""
        return sum(device.total_bytes for device in self.devices)


class FlashAttention(StrEnum):
    ON = "on"
    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions:
    """What of a server's command line decides memory; the defaults are llama-server's own."""

    #: slots; None = its default, 4 slots that share one cache
    parallel: int | None = None
    #: one cache for all slots; None = only where `parallel` is left to the server
    kv_unified: bool | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    flash_attn: FlashAttention = FlashAttention.AUTO
    swa_full: bool = False
    embeddings: bool = False
    kv_offload: bool = True
    #: beside the model's own: a projector's file and graph, on the first device or on the host
    projector_bytes: int = 0
    projector_compute_bytes: int = 0
    projector_offload: bool = True
    #: files of adapters (LoRA): how they divide over devices nobody says, so each is charged all
    adapter_bytes: int = 0
    #: tokens drafted per step: each slot then has so many outputs more
    draft_tokens: int = 0
    #: a draft model in the same layout
    draft: Estimate | None = None
    #: options given that no rule follows (--override-tensor): the estimate is deliberately high
    unmodelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What placing must know of a model; `estimate` is pure and takes well under a millisecond."""

    #: layers that can be offloaded, the output layer counted
    layer_count: int
    #: the first layers up to the last one with expert weights, which could stay on the host; 0 for
    #: dense models
    moe_layer_count: int
    #: tokens; None = as many as fit, up to max_context_size
    context_size: int | None
    #: the model's own (trained) context
    max_context_size: int
    #: bytes per device in a layout, corrected by what was measured, without overhead per GPU
    estimate: Callable[[Layout], Estimate]
