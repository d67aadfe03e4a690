"""A placement as a command line and an environment. Pure; nothing is started here.

Every default of llama-server that costs memory is spelled out, from the same options that the
estimate was made of, so that both speak of the same thing; `--fit off` keeps the server from
changing the plan. Extra arguments that say such a thing are in those options, and not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.config.server_args import read_args
from smartproxy.lifetime import OWNER_VARIABLE
from smartproxy.llama.binary import Binary, child_environment
from smartproxy.memory.estimate import Loaded
from smartproxy.memory.types import EstimateOptions
from smartproxy.planner.types import Placement

#: which GPUs a server sees
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the command line of a server of ours says, as far as its row needs it."""

    model_id: str
    port: int
    context_size: int
    parallel: int
    gpu_layers: int
    #: shares of the GPUs; () on the CPU
    tensor_split: tuple[float, ...]
    cpu_moe_layers: int


def read_command(argv: Sequence[str]) -> Said:
    """Return what `command` wrote. Raises KeyError or ValueError for another one's."""
    flag = {name: value for name, value in pairwise(argv) if name.startswith("--")}
    return Said(
        model_id=flag["--alias"],
        port=int(flag["--port"]),
        context_size=int(flag["--ctx-size"]),
        parallel=int(flag["--parallel"]),
        gpu_layers=int(flag["--n-gpu-layers"]),
        tensor_split=_split(flag),
        cpu_moe_layers=int(flag.get("--n-cpu-moe", 0)),
    )


def _split(flag: Mapping[str, str]) -> tuple[float, ...]:
    if flag.get("--device") == "none":
        return ()
    return tuple(float(share) for share in flag.get("--tensor-split", "1").split(","))


def gpus_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the UUIDs of a server's GPUs, in the order of its split, from its environment."""
    return tuple(uuid for uuid in environ.get(VISIBLE, "").split(",") if uuid)


def command(
    binary: Binary,
    spec: ModelSpec,
    placement: Placement,
    *,
    port: int,
    loaded: Loaded,
    devices: Sequence[str] = (),
) -> list[str]:
    """Return argv for a model in a placement on a port of the loopback interface.

    devices: the names of the placement's GPUs, where the environment alone does not choose them.
    """
    layout, extra = placement.layout, read_args(spec.args)
    assert spec.path is not None  # a model without a file never gets a placement
    flags: list[str] = [
        *("--model", str(spec.path), "--alias", spec.id),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", str(layout.context_size), "--parallel", str(spec.parallel)),
        "--kv-unified" if spec.kv_unified else "--no-kv-unified",
        *memory_flags(loaded.options),
        *device_flags(placement, devices),
    ]
    if layout.cpu_moe_layers:
        flags += ["--n-cpu-moe", str(layout.cpu_moe_layers)]
    if spec.embeddings:
        flags += ["--embedding"]
    if spec.mmproj and extra.projector:
        flags += ["--mmproj", str(spec.mmproj)]
        offloaded = extra.projector_offload and placement.gpus
        flags += [] if offloaded else ["--no-mmproj-offload"]
    flags += _draft_flags(
        binary, spec, placement, loaded, chooses_speculation=extra.chooses_speculation
    )
    if loaded.draft is not None and devices:
        flags += ["--device-draft", ",".join(devices)]
    # what older builds don't know is left out: they behave that way without being told
    flags += _if_known(binary, "--fit", "off")
    flags += _if_known(binary, "--offline")
    flags += _if_known(binary, "--slots")
    flags += ["--metrics"]
    if binary.trace_verbosity is not None:
        # it prints its buffers then, from which estimates learn; prompts are not printed
        flags += ["--log-verbosity", str(binary.trace_verbosity)]
    return [str(binary.path), *flags, *extra.rest]


def memory_flags(options: EstimateOptions) -> list[str]:
    """Return the flags for what a model's options say of memory, slots and context apart."""
    flags = ["--batch-size", str(options.batch), "--ubatch-size", str(options.ubatch)]
    flags += ["--cache-type-k", options.cache_type_k, "--cache-type-v", options.cache_type_v]
    flags += ["--flash-attn", options.flash_attn.value]
    if options.swa_full:
        flags += ["--swa-full"]
    if not options.kv_offload:
        flags += ["--no-kv-offload"]
    return flags


def _draft_flags(
    binary: Binary,
    spec: ModelSpec,
    placement: Placement,
    loaded: Loaded,
    *,
    chooses_speculation: bool,
) -> list[str]:
    """Return the draft model's flags: all its layers over the same GPUs, or none on any."""
    if loaded.draft is None:
        return []
    options, on_gpus = loaded.draft_options, bool(placement.gpus)
    flags = ["--model-draft", str(spec.draft_model)]
    flags += ["--gpu-layers-draft", str(loaded.draft.layer_count + 1 if on_gpus else 0)]
    if not on_gpus:
        flags += ["--device-draft", "none"]
    flags += _if_known(binary, "--cache-type-k-draft", options.cache_type_k)
    flags += _if_known(binary, "--cache-type-v-draft", options.cache_type_v)
    if not chooses_speculation:
        # b10068 on loads a draft model and never uses it unless told how
        flags += _if_known(binary, "--spec-type", "draft-simple")
    return flags


def device_flags(placement: Placement, devices: Sequence[str] = ()) -> list[str]:
    """Return the flags for the GPUs and layers of a placement."""
    if not placement.gpus:
        # without `--device none` a GPU build keeps a compute buffer on the GPU even at 0 layers
        return ["--device", "none", "--n-gpu-layers", "0"]
    flags = ["--device", ",".join(devices)] if devices else []
    flags += ["--n-gpu-layers", str(placement.layout.gpu_layers)]
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
    devices: Sequence[str] = (),
) -> dict[str, str]:
    """Return the child's environment: ours, scrubbed, with its GPUs by UUID in NVML's order."""
    env = child_environment(environ, binary.library_dir)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env[VISIBLE] = ",".join(share.uuid for share in placement.gpus)
    if devices:
        env["MTMD_BACKEND_DEVICE"] = devices[0]  # a projector does not go by --device
    env["LLAMA_API_KEY"] = api_key  # not on the command line, where every user could read it
    env[OWNER_VARIABLE] = str(state_dir)
    env.update(spec.env)
    return env
