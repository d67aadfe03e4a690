"""How good and how quick the memory estimate is: `python -m bench.estimate [--json FILE]`.

Answers every measured case of tests/data/memory-cases.csv with ours, with the widely copied
formula, and with file size + textbook KV cache; then times reading headers and estimating.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from bench import estimate_xllamacpp as xllamacpp
from smartproxy.memory.estimate import estimate
from smartproxy.memory.kv_cache import cache_type
from smartproxy.memory.types import EstimateOptions, Layout
from smartproxy.model_file.metadata import from_json, read_metadata, to_json
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import MIB
from tests.support import gguf_files, gguf_models
from tests.support.measured_cases import Case, all_cases, metadata_of, scratch_folder

TIMED = ("llama31-8b.Q4_K_M", "qwen25-7b.Q4_K_M", "gemma3-4b.Q4_K_M", "gptoss-20b.MXFP4")
REPEATS = 30
COLD_REPEATS = 9
Predict = Callable[[Case, ModelMetadata], float]


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write results here.")
@click.option(
    "--with-xllamacpp",
    is_flag=True,
    help="Install xllamacpp under .bench and ask it too (minutes).",
)
def main(json_file: Path | None, with_xllamacpp: bool) -> None:
    """Print accuracy and speed of the memory estimate."""
    accuracy, speed = accuracy_rows(with_xllamacpp=with_xllamacpp), speed_rows()
    click.echo(tabulate(accuracy, headers="keys", floatfmt=".2f"))
    click.echo("")
    click.echo(tabulate(speed, headers="keys", floatfmt=".2f"))
    if json_file is not None:
        json_file.write_text(json.dumps({"accuracy": accuracy, "speed": speed}, indent=2) + "\n")


def accuracy_rows(*, with_xllamacpp: bool = False) -> list[dict[str, Any]]:
    """Return error statistics, in percent of the device memory measured."""
    groups = {name: list(cases) for name, cases in _groups()}
    rows = [_errors(f"ours, {name}", cases, _ours) for name, cases in groups.items()]
    one_gpu = groups["one GPU"]
    rows.append(_errors("file size + textbook KV", one_gpu, _textbook))
    rows.append(_errors("copied formula, width of the model", one_gpu, _copied_model_width))
    rows.append(_errors("copied formula, width of a head", one_gpu, _copied_head_width))
    if with_xllamacpp:
        told = dict(zip((case.name for case in one_gpu), xllamacpp.answers(one_gpu), strict=True))
        answered = [case for case in one_gpu if told[case.name] is not None]
        name = f"xllamacpp {xllamacpp.version()}"
        rows.append(_errors(name, answered, lambda case, _: float(told[case.name] or 0)))
    return rows


def speed_rows() -> list[dict[str, Any]]:
    """Return milliseconds per model: read from disk, read again, from the cache, estimated."""
    rows = []
    for name in TIMED:
        path = gguf_files.write(gguf_models.MODELS[name](), scratch_folder())
        cold = _milliseconds(
            partial(read_metadata, path), repeats=COLD_REPEATS, before=partial(_forget_pages, path)
        )
        metadata = read_metadata(path)
        text = to_json(metadata)
        layout = Layout(tensor_split=(1.0,), gpu_layers=999, context_size=8192)
        rows.append(
            {
                "ms": name,
                "tokens": metadata.vocabulary_size,
                "pages not in memory": cold,
                "pages in memory": _milliseconds(partial(read_metadata, path)),
                "from cached JSON": _milliseconds(partial(from_json, text)),
                "estimate": _milliseconds(partial(estimate, metadata, EstimateOptions(), layout)),
            }
        )
    return rows


def _groups() -> Iterable[tuple[str, Iterable[Case]]]:
    full = [case for case in all_cases() if case.is_full(scratch_folder())]
    yield "one GPU", [case for case in full if len(case.layout.tensor_split) == 1]
    yield "several GPUs", [case for case in full if len(case.layout.tensor_split) > 1]
    yield "something on the host", [case for case in all_cases() if case not in full]


def _errors(name: str, cases: Iterable[Case], predict: Predict) -> dict[str, Any]:
    errors = []
    for case in cases:
        predicted = predict(case, metadata_of(case.file, scratch_folder()))
        errors.append(100 * (predicted / MIB - case.total_mib) / case.total_mib)
    sizes = sorted(abs(error) for error in errors)
    return {
        "estimator": name,
        "cases": len(errors),
        "mean %": statistics.fmean(sizes),
        "p95 %": sizes[int(0.95 * (len(sizes) - 1))],
        "lowest %": min(errors),
        "highest %": max(errors),
        # the log rounds to 0.01 MiB
        "under": sum(1 for error in errors if error < -0.01),
    }


def _ours(case: Case, metadata: ModelMetadata) -> float:
    return estimate(metadata, case.options, case.layout).total_bytes


def _textbook(case: Case, metadata: ModelMetadata) -> float:
    heads = max(metadata.kv_head_counts, default=0)
    width = heads * (
        metadata.key_length * _element_bytes(case.options.cache_type_k)
        + metadata.value_length * _element_bytes(case.options.cache_type_v)
    )
    return metadata.file_bytes + metadata.layer_count * case.layout.context_size * width


def _copied_model_width(case: Case, metadata: ModelMetadata) -> float:
    return _copied(case, metadata, metadata.embedding_length)


def _copied_head_width(case: Case, metadata: ModelMetadata) -> float:
    return _copied(case, metadata, metadata.key_length)


def _copied(case: Case, metadata: ModelMetadata, width: int) -> float:
    """Return file size + layers x KV heads x tokens x width x bytes, in bytes."""
    heads = max(metadata.kv_head_counts, default=0)
    cells = metadata.layer_count * heads * case.layout.context_size
    return metadata.file_bytes + cells * width * _element_bytes(case.options.cache_type_k)


def _element_bytes(type_name: str) -> float:
    block, block_bytes = cache_type(type_name)
    return block_bytes / block


def _milliseconds(
    work: Callable[[], object],
    *,
    repeats: int = REPEATS,
    before: Callable[[], object] = lambda: None,
) -> float:
    times = []
    for _ in range(repeats):
        before()
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _forget_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
