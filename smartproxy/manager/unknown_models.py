"""Ask llama.cpp's own tool about models whose architecture our rules don't know. A background job.

Where the build has `llama-fit-params` beside its server, it is run once per such model and its
settings, for the whole model on one GPU (without GPUs: on the CPU), with the options that a server
would get. It reads the header, allocates no buffers, and tells MiB per device; that is kept like a
measurement (server_id NULL) and used until a server of these settings has run. It charges a little
more than a server takes: logits of a whole batch.
"""

from __future__ import annotations

import logging
import time

from smartproxy.catalog.catalog import ModelSpec
from smartproxy.errors import SmartProxyError
from smartproxy.gpus.types import Gpu
from smartproxy.llama import fit_params
from smartproxy.llama.fit_params import NAME
from smartproxy.manager import measure, needs
from smartproxy.manager.context import Tools
from smartproxy.manager.gpu_watch import GpuView
from smartproxy.manager.served import file_key, loaded_of, options_key, settings_key
from smartproxy.memory.estimate import Loaded, make_need
from smartproxy.memory.types import Layout
from smartproxy.planner.types import GpuShare, Placement
from smartproxy.state import measurements
from smartproxy.types import GIB, MIB

logger = logging.getLogger(__name__)

#: it makes a context on the GPU for a moment: not where that could be in somebody's way
LEAST_FREE_BYTES = 2 * GIB


def ask_about_unknown(tools: Tools, view: GpuView, asked: set[str]) -> None:
    """Ask about every model that the rules don't know and that was not asked about yet.

    asked: the settings that were asked about; only this job, which never runs twice at a time,
    writes it.
    """
    if view.seen is None or not fit_params.is_there(tools.binary):
        return
    for spec in tools.catalog.models.values():
        try:
            loaded = loaded_of(tools.store, spec)
        except SmartProxyError:
            continue  # whoever asks for it is told why
        if loaded.metadata.unknown is None or tools.stopping.is_set():
            continue
        gpu = _roomiest(view)
        if gpu is None and view.gpus:
            continue
        placement = _placement(spec, loaded, gpu)
        options = options_key(spec, loaded, tools.binary.build)
        key = settings_key(options, placement.layout)
        if key not in asked and not _known(tools, spec, key):
            _ask(tools, spec, placement, loaded)
        asked.add(key)


def _known(tools: Tools, spec: ModelSpec, key: str) -> bool:
    rows = measurements.of_file(tools.store, file_key(spec), tools.binary.build)
    return any(row.settings_key == key and row.buffers_bytes for row in rows)


def _roomiest(view: GpuView) -> Gpu | None:
    healthy = [gpu for gpu in view.gpus if gpu.error is None and gpu.free_bytes >= LEAST_FREE_BYTES]
    return max(healthy, key=lambda gpu: gpu.free_bytes, default=None)


def _placement(spec: ModelSpec, loaded: Loaded, gpu: Gpu | None) -> Placement:
    need = make_need(loaded, context_size=needs.context_size(spec, loaded.metadata))
    layout = Layout(
        tensor_split=(1.0,) if gpu else (),
        gpu_layers=need.layer_count if gpu else 0,
        context_size=need.context_size or need.max_context_size,
    )
    return Placement(
        gpus=(GpuShare(uuid=gpu.uuid, index=gpu.index, bytes=0),) if gpu else (),
        layout=layout,
        estimate=need.estimate(layout),
        reason=f"asking {NAME}",
    )


def _ask(tools: Tools, spec: ModelSpec, placement: Placement, loaded: Loaded) -> None:
    began = time.monotonic()
    try:
        sizes = fit_params.device_bytes(
            tools.binary, spec, placement, loaded.options, tools.stopping
        )
    except fit_params.NoAnswer as error:
        logger.warning("model '%s': %s", spec.id, error)
        return
    measure.expect(tools, None, placement, spec=spec, loaded=loaded, told=sizes)
    logger.info(
        "model '%s' (%s): %s tells %s MB per device, the host last, in %.1f s",
        *(spec.id, loaded.metadata.unknown, NAME),
        *([size // MIB for size in sizes], time.monotonic() - began),
    )
