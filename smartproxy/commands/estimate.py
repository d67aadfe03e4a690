"""`smartproxy estimate FILE...`: what models would take, without loading them.

Reads headers, computes, prints: a table, bars, a matrix of context sizes and cache types, or JSON.
What is left out has llama-server's own default. Exit code 1 where a file can't be read; the other
files are answered all the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from smartproxy.commands import estimate_views
from smartproxy.errors import MetadataError
from smartproxy.gpus.cuda import default_overhead_bytes
from smartproxy.memory.estimate import clamped_context, estimate
from smartproxy.memory.kv_cache import CACHE_TYPES, is_quantized
from smartproxy.memory.types import DeviceBytes, Estimate, EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.metadata import read_metadata
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import GIB

#: llama.cpp takes no more shares than this (llama_max_devices)
MAX_DEVICES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The command line, as the estimate wants it."""

    options: EstimateOptions
    #: its context size is 0 where the trained context is meant
    layout: Layout
    #: size of each GPU; None = not told
    card_bytes: int | None


@click.command("estimate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--ctx-size", type=click.IntRange(0), default=0, help="Tokens; 0: as trained.")
@click.option("--cache-type-k", type=click.Choice(list(CACHE_TYPES)), default="f16")
@click.option("--cache-type-v", type=click.Choice(list(CACHE_TYPES)), default="f16")
@click.option("--parallel", type=click.IntRange(1), help="Slots; default: 4 that share a cache.")
@click.option("--gpu-layers", type=int, default=-1, help="Layers on GPUs; below 0: all.")
@click.option("--tensor-split", help="Shares per GPU, such as 3,1; default: one GPU.")
@click.option("--ubatch", type=click.IntRange(1), default=512, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=2048, show_default=True)
@click.option(
    "--flash-attn", type=click.Choice([kind.value for kind in FlashAttention]), default="auto"
)
@click.option("--kv-unified", is_flag=True, help="One cache for all slots.")
@click.option("--swa-full", is_flag=True, help="Sliding-window layers cache the whole context.")
@click.option("--embeddings", is_flag=True)
@click.option(
    "--n-cpu-moe", type=click.IntRange(0), default=0, help="Layers with experts on the host."
)
@click.option("--no-kv-offload", is_flag=True, help="The KV cache stays on the host.")
@click.option("--matrix", is_flag=True, help="What fits: context sizes by cache types.")
@click.option(
    "--card-gb",
    type=click.FloatRange(0, min_open=True, max=1 << 20),
    help="Memory of each GPU in GB. Its overhead follows from it, and --matrix marks what is"
    " too big. Without it, the overhead is the one of the largest GPU.",
)
@click.option("--bars", is_flag=True, help="Draw the parts as bars.")
@click.option("--json", "as_json", is_flag=True)
def estimate_command(files: tuple[Path, ...], **asked: Any) -> None:
    """Say how much memory each GGUF FILE takes in llama-server, per device and on the host.

    If a model has several files, name the first. Sizes are in MiB (2^20 bytes), in the matrix in
    GB (2^30 bytes).
    """
    wanted = _asked(asked)
    failed, answers = False, []
    for file in files:
        try:
            metadata = read_metadata(file)
        except MetadataError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        if asked["as_json"]:
            answers.append(_json(file, metadata, wanted, matrix=asked["matrix"]))
        else:
            _print(file, metadata, wanted, asked)
    if asked["as_json"] and answers:
        click.echo(json.dumps(answers if len(files) > 1 else answers[0], indent=2))
    if failed:
        raise SystemExit(1)


def _asked(asked: dict[str, Any]) -> _Asked:
    options = EstimateOptions(
        parallel=asked["parallel"],
        kv_unified=asked["kv_unified"] or None,
        cache_type_k=asked["cache_type_k"],
        cache_type_v=asked["cache_type_v"],
        batch=asked["batch"],
        ubatch=asked["ubatch"],
        flash_attn=FlashAttention(asked["flash_attn"]),
        swa_full=asked["swa_full"],
        embeddings=asked["embeddings"],
        kv_offload=not asked["no_kv_offload"],
    )
    if is_quantized(options.cache_type_v) and options.flash_attn is FlashAttention.OFF:
        raise click.UsageError(
            f"--cache-type-v {options.cache_type_v} needs flash attention:"
            " llama-server does not start with --flash-attn off"
        )
    layout = Layout(
        tensor_split=_shares(asked["tensor_split"]),
        gpu_layers=asked["gpu_layers"],
        context_size=asked["ctx_size"],
        cpu_moe_layers=asked["n_cpu_moe"],
    )
    card_gb = asked["card_gb"]
    card_bytes = None if card_gb is None else int(card_gb * GIB)
    return _Asked(options=options, layout=layout, card_bytes=card_bytes)


def _shares(text: str | None) -> tuple[float, ...]:
    if text is None:
        return (1.0,)
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(","))
    except ValueError:
        hint = f"{text!r} is not a list like 3,1"
        raise click.BadParameter(hint, param_hint="--tensor-split") from None
    finite = all(0 <= share < float("inf") for share in shares)
    if not finite or not any(shares) or len(shares) > MAX_DEVICES:
        raise click.BadParameter(
            f"{text!r}: 1 to {MAX_DEVICES} shares, none negative, not all zero",
            param_hint="--tensor-split",
        )
    return shares


def _predict(metadata: ModelMetadata, wanted: _Asked) -> Estimate:
    """Return the estimate, with the overhead of a GPU nobody measured on each that is used."""
    layout, all_layers = wanted.layout, metadata.layer_count + 1
    layers = layout.gpu_layers if 0 <= layout.gpu_layers < all_layers else all_layers
    context = layout.context_size or clamped_context(metadata, 0)
    layout = replace(layout, gpu_layers=layers, context_size=context)
    predicted = estimate(metadata, wanted.options, layout)
    overhead = default_overhead_bytes(wanted.card_bytes)
    devices = tuple(
        replace(device, overhead_bytes=overhead if device.buffers_bytes else 0)
        for device in predicted.devices
    )
    return replace(predicted, devices=devices)


def _print(file: Path, metadata: ModelMetadata, wanted: _Asked, asked: dict[str, Any]) -> None:
    predicted = _predict(metadata, wanted)
    click.echo(estimate_views.heading(file, metadata, predicted))
    click.echo(estimate_views.table(predicted))
    overhead = default_overhead_bytes(wanted.card_bytes)
    click.echo(estimate_views.overhead_note(overhead, wanted.card_bytes))
    if asked["bars"]:
        click.echo(estimate_views.bars(predicted))
    if asked["matrix"]:
        click.echo(estimate_views.matrix(_matrix(metadata, wanted), wanted.card_bytes))
    click.echo("")


def _matrix(metadata: ModelMetadata, wanted: _Asked) -> dict[int, dict[str, int]]:
    """Return the bytes of the fullest device by context size and cache type."""
    cells: dict[int, dict[str, int]] = {}
    off = wanted.options.flash_attn is FlashAttention.OFF
    for context in estimate_views.context_sizes(clamped_context(metadata, 0)):
        cells[context] = {}
        for kind in ("f16", "q8_0", "q4_0"):
            if off and is_quantized(kind):
                continue
            options = replace(wanted.options, cache_type_k=kind, cache_type_v=kind)
            layout = replace(wanted.layout, context_size=context)
            predicted = _predict(metadata, replace(wanted, options=options, layout=layout))
            cells[context][kind] = max(device.total_bytes for device in predicted.devices)
    return cells


def _json(file: Path, metadata: ModelMetadata, wanted: _Asked, *, matrix: bool) -> dict[str, Any]:
    predicted = _predict(metadata, wanted)
    answer: dict[str, Any] = {
        "file": str(file),
        "name": metadata.name,
        "architecture": metadata.architecture,
        "parameters": metadata.parameters,
        "quantization": metadata.quantization,
        "trained_context": metadata.trained_context,
        "context_size": predicted.layout.context_size,
        "layers": metadata.layer_count + 1,
        "gpu_layers": predicted.layout.gpu_layers,
        "card_bytes": wanted.card_bytes,
        "devices": [_parts(device) for device in predicted.devices],
        "host": _parts(predicted.host),
        "total_bytes": predicted.total_bytes,
        "buffers_bytes": sum(device.buffers_bytes for device in predicted.devices),
        "confident": predicted.confident,
    }
    if metadata.unknown is not None:
        answer["unknown"] = metadata.unknown
    if matrix:
        answer["matrix"] = _matrix(metadata, wanted)
    return answer


def _parts(device: DeviceBytes) -> dict[str, int]:
    return {
        "weights_bytes": device.weights_bytes,
        "kv_cache_bytes": device.kv_cache_bytes,
        "recurrent_bytes": device.recurrent_bytes,
        "compute_bytes": device.compute_bytes,
        "overhead_bytes": device.overhead_bytes,
        "total_bytes": device.total_bytes,
    }


if __name__ == "__main__":
    estimate_command(prog_name="smartproxy estimate")
