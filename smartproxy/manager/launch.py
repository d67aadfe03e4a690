"""A placement as a command line and an environment. Pure; nothing is started here.

Every default of llama-server that costs memory is spelled out, so that the estimate and the server
speak of the same thing, and `--fit off` keeps the server from changing the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from smartproxy.catalog import ModelSpec
from smartproxy.lifetime import OWNER_VARIABLE
from smartproxy.manager.binary import Binary, child_environment
from smartproxy.types import Placement

BATCH_SIZE = 2048
UBATCH_SIZE = 512
#: at 4 llama-server prints its buffers, from which estimates learn; prompts are not printed
LOG_VERBOSITY = 4


def command(binary: Binary, spec: ModelSpec, placement: Placement, port: int) -> list[str]:
    """Return argv for a model in a placement on a port of the loopback interface."""
    layout = placement.layout
    assert spec.path is not None  # a model without a file never gets a placement
    flags: list[str | None] = [
        *("--model", str(spec.path), "--alias", spec.id),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", str(layout.context_size), "--parallel", str(spec.parallel)),
        "--kv-unified" if spec.kv_unified else "--no-kv-unified",
        *("--batch-size", str(BATCH_SIZE), "--ubatch-size", str(UBATCH_SIZE)),
        *("--cache-type-k", spec.cache_type_k, "--cache-type-v", spec.cache_type_v),
        *("--flash-attn", "auto", "--metrics"),
    ]
    flags += _device_flags(placement)
    if layout.cpu_moe_layers:
        flags += ["--n-cpu-moe", str(layout.cpu_moe_layers)]
    if spec.embeddings:
        flags += ["--embedding"]
    if spec.mmproj:
        flags += ["--mmproj", str(spec.mmproj)]
    if spec.draft_model:
        flags += ["--model-draft", str(spec.draft_model)]
    # what older builds don't know is left out: they behave that way without being told
    flags += _if_known(binary, "--fit", "off")
    flags += _if_known(binary, "--offline")
    flags += _if_known(binary, "--slots")
    flags += ["--log-verbosity", str(LOG_VERBOSITY)]
    return [str(binary.path), *(flag for flag in flags if flag is not None), *spec.args]


def _device_flags(placement: Placement) -> list[str]:
    if not placement.gpus:
        # without `--device none` a GPU build keeps a compute buffer on the GPU even at 0 layers
        return ["--device", "none", "--n-gpu-layers", "0"]
    flags = ["--n-gpu-layers", str(placement.layout.gpu_layers)]
    if len(placement.gpus) == 1:
        return [*flags, "--split-mode", "none", "--main-gpu", "0"]
    shares = ",".join(f"{share:g}" for share in placement.layout.tensor_split)
    return [*flags, "--split-mode", "layer", "--tensor-split", shares]


def _if_known(binary: Binary, *flag: str) -> list[str]:
    return list(flag) if flag[0] in binary.flags else []


def environment(
    binary: Binary,
    spec: ModelSpec,
    placement: Placement,
    *,
    environ: Mapping[str, str],
    api_key: str,
    state_dir: Path,
) -> dict[str, str]:
    """Return the child's environment: ours, scrubbed, with its GPUs by UUID in NVML's order."""
    env = child_environment(environ, binary.library_dir)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env["CUDA_VISIBLE_DEVICES"] = ",".join(share.uuid for share in placement.gpus)
    env["LLAMA_API_KEY"] = api_key  # not on the command line, where every user could read it
    env[OWNER_VARIABLE] = str(state_dir)
    env.update(spec.env)
    return env
