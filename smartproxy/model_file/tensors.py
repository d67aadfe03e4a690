"""Sum a model's tensors by layer: the bytes a device would hold, and where the file holds them.

Input: the headers of all parts; output: `TensorSums`. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from smartproxy.gpus.cuda import DEVICE_ALIGNMENT, ROW_PADDING
from smartproxy.model_file.architectures import ENCODERS, is_input_tensor
from smartproxy.model_file.header import BadHeader, Header, TensorInfo
from smartproxy.model_file.types import FileSpan, LayerTensors

#: type number -> (weights per block, bytes per block)
BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}
HOST_ALIGNMENT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSums:
    layers: tuple[LayerTensors, ...]
    output: LayerTensors
    input_bytes: int
    input_spans: tuple[FileSpan, ...]
    parameters: int
    quantization: str
    query_length: int
    #: types that this code's table lacks, by number
    unknown_types: tuple[int, ...]


@dataclass(slots=True)
class _Layer:
    """A layer while its tensors are being added up."""

    weights: int = 0
    experts: int = 0
    largest: int = 0
    gate_up: int = 0
    attention: int = 0
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    expert_spans: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A tensor with its size."""

    info: TensorInfo
    bytes: int
    device_bytes: int
    file: int
    start: int


def sum_tensors(
    parts: Sequence[tuple[Header, int]], architecture: str, layer_count: int, skipped: int
) -> TensorSums:
    """Return the sums over all parts: (header, file size in bytes) each.

    skipped: so many last layers are not loaded (multi-token prediction). Raises BadHeader where
    a tensor lies outside its file or outside the layers.
    """
    layers = [_Layer() for _ in range(layer_count)]
    output, inputs, embedding = _Layer(), _Layer(), None
    counted: Counter[int] = Counter()
    parameters = query_length = 0
    has_output = False
    for tensor in _placed(parts):
        name = tensor.info.name
        parameters += prod(tensor.info.dims)
        if name.startswith("blk."):
            layer = _layer_index(name, layer_count)
            counted[tensor.info.type] += tensor.bytes if len(tensor.info.dims) > 1 else 0
            if layer < layer_count - skipped:
                _add_to_layer(layers[layer], tensor)
                query_length = max(query_length, _query_length(tensor.info))
        elif is_input_tensor(architecture, name):
            _add(inputs, tensor, -(-tensor.bytes // HOST_ALIGNMENT) * HOST_ALIGNMENT)
            embedding = tensor if name == "token_embd.weight" else embedding
        else:
            _add(output, tensor, tensor.device_bytes)
            has_output = has_output or name == "output.weight"
    if not has_output and architecture not in ENCODERS and embedding is not None:
        # a tied embedding is loaded a second time for the output (llama-model-loader.cpp)
        _add(output, embedding, embedding.device_bytes)
    return TensorSums(
        layers=tuple(_frozen(layer) for layer in layers),
        output=_frozen(output),
        input_bytes=inputs.weights,
        input_spans=_spans(inputs.spans),
        parameters=parameters,
        quantization=_quantization(parts, counted),
        query_length=query_length,
        unknown_types=tuple(sorted(kind for kind in counted if kind not in BLOCKS)),
    )


def _placed(parts: Sequence[tuple[Header, int]]) -> Iterator[_Placed]:
    for file, (header, file_bytes) in enumerate(parts):
        ends = _unknown_type_ends(header, file_bytes)
        for info in header.tensors:
            size, padding = _size(info, ends)
            start = header.data_offset + info.offset
            if start + size > file_bytes:
                raise BadHeader(
                    f"tensor {info.name!r} ends at byte {start + size}, the file at {file_bytes}:"
                    " it is incomplete"
                )
            device = -(-(size + padding) // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
            yield _Placed(info=info, bytes=size, device_bytes=device, file=file, start=start)


def _unknown_type_ends(header: Header, file_bytes: int) -> dict[int, int]:
    """Return where each tensor's data ends at most, by offset; empty where all types are known."""
    if all(info.type in BLOCKS for info in header.tensors):
        return {}
    offsets = sorted({info.offset for info in header.tensors})
    return dict(
        zip(offsets, [*offsets[1:], max(offsets[-1], file_bytes - header.data_offset)], strict=True)
    )


def _size(info: TensorInfo, ends: dict[int, int]) -> tuple[int, int]:
    """Return (bytes in the file, bytes of row padding on a CUDA device)."""
    if info.type not in BLOCKS:
        return ends[info.offset] - info.offset, 0
    block, block_bytes = BLOCKS[info.type]
    row = info.dims[0] if info.dims else 1
    if row % block:
        raise BadHeader(f"tensor {info.name!r}: rows of {row} are not whole blocks of {block}")
    size = prod(info.dims) // block * block_bytes
    over = row % ROW_PADDING
    if block == 1 or not over:
        return size, 0
    return size, (ROW_PADDING - over) // block * block_bytes


def _layer_index(name: str, layer_count: int) -> int:
    index = name.split(".", 2)[1]
    if not index.isascii() or not index.isdigit() or int(index[:6]) >= layer_count:
        raise BadHeader(f"tensor {name!r} is outside the model's {layer_count} layers")
    return int(index)


def _add_to_layer(layer: _Layer, tensor: _Placed) -> None:
    name, size = tensor.info.name, tensor.device_bytes
    is_expert = "_exps." in name or "_chexps." in name
    _add(layer, tensor, size, is_expert=is_expert)
    if is_expert:
        layer.experts += size
    if ".attn_" in name:
        layer.attention += size
    if ".ffn_gate" in name or ".ffn_up" in name:
        layer.gate_up += size


def _add(layer: _Layer, tensor: _Placed, size: int, *, is_expert: bool = False) -> None:
    layer.weights += size
    layer.largest = max(layer.largest, size)
    spans = layer.expert_spans if is_expert else layer.spans
    start, end = spans.get(tensor.file, (tensor.start, tensor.start))
    spans[tensor.file] = (min(start, tensor.start), max(end, tensor.start + tensor.bytes))


def _query_length(info: TensorInfo) -> int:
    if ".attn_q.weight" in info.name or ".attn_q_b.weight" in info.name:
        return info.dims[1] if len(info.dims) > 1 else 0
    return 0


def _frozen(layer: _Layer) -> LayerTensors:
    return LayerTensors(
        weights_bytes=layer.weights,
        expert_bytes=layer.experts,
        largest_bytes=layer.largest,
        gate_up_bytes=layer.gate_up,
        attention_bytes=layer.attention,
        spans=_spans(layer.spans),
        expert_spans=_spans(layer.expert_spans),
    )


def _spans(spans: dict[int, tuple[int, int]]) -> tuple[FileSpan, ...]:
    return tuple(
        FileSpan(file=file, start=start, end=end) for file, (start, end) in sorted(spans.items())
    )


def _quantization(parts: Sequence[tuple[Header, int]], counted: Counter[int]) -> str:
    """Return the type that holds most bytes of the layers, with llama-quantize's mix where one
    shows: K types with wider ones among ffn_down or attn_v are its M, those without its S.
    """
    if not counted:
        return "unknown"
    kind = counted.most_common(1)[0][0]
    name = _NAMES.get(kind, f"type-{kind}")
    if name not in ("Q3_K", "Q4_K", "Q5_K"):
        return name
    mixed = {
        _NAMES.get(info.type, "")
        for header, _ in parts
        for info in header.tensors
        if ".ffn_down" in info.name or ".attn_v." in info.name or ".attn_qkv." in info.name
    }
    if name == "Q3_K":
        return "Q3_K_" + ("S" if mixed <= {name} else "L" if "Q4_K" not in mixed else "M")
    return f"{name}_M" if "Q6_K" in mixed else f"{name}_S"
