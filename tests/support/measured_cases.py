"""The measured loads of `data/memory-cases.csv`, and the estimates that answer them."""

from __future__ import annotations

import atexit
import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

from smartproxy.memory.estimate import estimate
from smartproxy.memory.types import Estimate, EstimateOptions, FlashAttention, Layout
from smartproxy.model_file.metadata import read_metadata
from smartproxy.model_file.types import ModelMetadata
from smartproxy.types import MIB
from tests.support import gguf_files, gguf_models
from tests.support.paths import ROOT

CASES_FILE = ROOT / "tests" / "data" / "memory-cases.csv"
REAL_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load of the stock server: what was asked for, and MiB as the log printed them."""

    name: str
    file: str
    options: EstimateOptions
    layout: Layout
    total_mib: float
    #: model, KV, RS and compute, by device in the order of the layout
    devices_mib: tuple[Mapping[str, float], ...]
    host_mib: Mapping[str, float]

    def predicted(self, folder: Path) -> Estimate:
        return estimate(metadata_of(self.file, folder), self.options, self.layout)

    def is_full(self, folder: Path) -> bool:
        """Every weight is on a device, and the caches too."""
        layers = metadata_of(self.file, folder).layer_count
        on_devices = self.layout.gpu_layers > layers and not self.layout.cpu_moe_layers
        return on_devices and self.options.kv_offload


@lru_cache(maxsize=1)
def all_cases() -> tuple[Case, ...]:
    with CASES_FILE.open(newline="") as file:
        return tuple(_case(row) for row in csv.DictReader(file))


@lru_cache(maxsize=32)
def metadata_of(file: str, folder: Path) -> ModelMetadata:
    """Return a case's metadata, from the real file or from one made of its shape."""
    if file == REAL_MODEL.name:
        return read_metadata(REAL_MODEL)
    shape = gguf_models.MODELS[file.removesuffix(".gguf")]()
    path = gguf_files.part_paths(shape, folder)[0]
    return read_metadata(path if path.exists() else gguf_files.write(shape, folder))


@lru_cache(maxsize=1)
def scratch_folder() -> Path:
    """Return a folder for the files of a bench run, removed when it ends."""
    folder = Path(mkdtemp(prefix="smartproxy-shapes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _case(row: dict[str, str]) -> Case:
    extra = row["extra"].split()
    devices = _devices(row)
    shares = (1.0,) * len(devices)
    if "-ts" in extra:
        shares = tuple(float(share) for share in extra[extra.index("-ts") + 1].split(","))
    options = EstimateOptions(
        parallel=int(row["parallel"]),
        kv_unified=row["kv_unified"] == "true",
        cache_type_k=row["ctk"],
        cache_type_v=row["ctv"],
        ubatch=int(row["ubatch"]),
        flash_attn=FlashAttention(row["fa"]),
        kv_offload="--no-kv-offload" not in extra,
    )
    layout = Layout(
        tensor_split=shares,
        gpu_layers=int(row["ngl"]),
        context_size=int(row["ctx"]),
        cpu_moe_layers=_cpu_moe_layers(extra),
    )
    return Case(
        name=row["case"],
        file=row["file"],
        options=options,
        layout=layout,
        total_mib=float(row["total_dev"]),
        devices_mib=devices,
        host_mib={part: float(row[f"host_{part}"]) for part in ("model", "kv", "rs", "compute")},
    )


def _devices(row: dict[str, str]) -> tuple[Mapping[str, float], ...]:
    if row["per_dev_json"]:
        return tuple(json.loads(row["per_dev_json"]).values())
    names = {"model": "model", "KV": "kv", "RS": "rs", "compute": "compute"}
    return ({name: float(row[f"dev_{column}"]) for name, column in names.items()},)


def _cpu_moe_layers(extra: list[str]) -> int:
    if "--cpu-moe" in extra:
        return 512
    return int(extra[extra.index("--n-cpu-moe") + 1]) if "--n-cpu-moe" in extra else 0


def to_mib(size_bytes: int) -> float:
    return size_bytes / MIB
