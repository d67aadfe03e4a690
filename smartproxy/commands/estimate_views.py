"""Estimates as text: a table, bars, a matrix. Pure: values in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from smartproxy.memory.types import DeviceBytes, Estimate
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import GIB, MIB

BAR_WIDTH = 50
SMALLEST_CONTEXT = 2048
_PARTS = ("weights", "kv_cache", "recurrent", "compute", "overhead")
_FILLS = dict(zip(_PARTS, "█▓▒░·", strict=True))


def heading(file: Path, metadata: ModelMetadata, predicted: Estimate) -> str:
    """Return one or two lines: what the model is, and whether to trust the numbers."""
    lines = [
        f"{file}: {metadata.architecture}, {metadata.parameters / 1e9:.2f} B parameters,"
        f" {metadata.quantization}, {predicted.layout.context_size} tokens,"
        f" {predicted.layout.gpu_layers} of {metadata.layer_count + 1} layers on"
        f" {len(predicted.devices)} GPU{'s' if len(predicted.devices) != 1 else ''}"
    ]
    if metadata.unknown is not None:
        lines.append(f"Unknown {metadata.unknown}: the estimate is high on purpose.")
    return "\n".join(lines)


def table(predicted: Estimate) -> str:
    """Return the parts in MiB, a line per device, the host last."""
    rows = [[name, *_mebibytes(device)] for name, device in _named(predicted)]
    headers = ["MiB", "weights", "KV cache", "state", "compute", "overhead", "total"]
    return tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="simple")


def overhead_note(overhead_bytes: int, card_bytes: int | None) -> str:
    """Return the line that says whose overhead is counted. card_bytes: None = not told."""
    size = f"{overhead_bytes / MIB:g} MiB"
    if card_bytes is None:
        return f"Overhead: {size}, as for the largest GPU. --card-gb tells the size of yours."
    return f"Overhead: {size}, as for any GPU of {card_bytes / GIB:g} GB that nobody measured."


def bars(predicted: Estimate) -> str:
    """Return a bar per device, all on one scale, and the key to their fills."""
    largest = max(device.total_bytes for _, device in _named(predicted)) or 1
    lines = [
        f"{name:<6} {_bar(device, largest):<{BAR_WIDTH}} {device.total_bytes / GIB:.2f} GB"
        for name, device in _named(predicted)
    ]
    key = "  ".join(f"{fill} {part.replace('_', ' ')}" for part, fill in _FILLS.items())
    return "\n".join(["", *lines, f"{'':<6} {key}"])


def context_sizes(trained: int) -> list[int]:
    """Return the matrix's rows: powers of two up to the trained context, and that itself."""
    sizes, size = [], SMALLEST_CONTEXT
    while size < trained:
        sizes.append(size)
        size *= 2
    return [*sizes, trained]


def matrix(cells: Mapping[int, Mapping[str, int]], card_bytes: int | None) -> str:
    """Return GB on the fullest GPU by context size and cache type; "(no)" marks what is too big.

    card_bytes: None = no size was told, nothing is marked.
    """
    kinds = list(next(iter(cells.values())))
    rows = [[size, *(_cell(cells[size][kind], card_bytes) for kind in kinds)] for size in cells]
    title = "\nGB on the fullest GPU"
    if card_bytes is not None:
        title += f"; (no) = does not fit {card_bytes / GIB:g} GB"
    return f"{title}\n{tabulate(rows, ['tokens', *kinds], 'simple', disable_numparse=True)}"


def _cell(total_bytes: int, card_bytes: int | None) -> str:
    too_big = card_bytes is not None and total_bytes > card_bytes
    return f"{total_bytes / GIB:.2f}" + (" (no)" if too_big else "")


def _named(predicted: Estimate) -> list[tuple[str, DeviceBytes]]:
    devices = [(f"GPU {index}", device) for index, device in enumerate(predicted.devices)]
    return [*devices, ("host", predicted.host)]


def _mebibytes(device: DeviceBytes) -> list[float]:
    parts = [getattr(device, f"{part}_bytes") / MIB for part in _PARTS]
    return [*parts, device.total_bytes / MIB]


def _bar(device: DeviceBytes, largest: int) -> str:
    bar, done = "", 0
    for part, fill in _FILLS.items():
        # ends are rounded, not lengths, so that errors do not add up
        done += getattr(device, f"{part}_bytes")
        bar += fill * (round(done / largest * BAR_WIDTH) - len(bar))
    return bar
