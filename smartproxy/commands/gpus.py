"""`smartproxy gpus`: the GPUs as the manager last saw them, from the state file.

It asks neither NVML nor the proxy, so that it works while they are down; the age of what it shows
stands below the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from tabulate import tabulate

from smartproxy.commands.options import where
from smartproxy.config.load import load_settings
from smartproxy.entities import GPU, GPUProcess
from smartproxy.errors import ManagerDown
from smartproxy.proxy.pages import view
from smartproxy.state.manager_row import manager_row
from smartproxy.state.store import Store

HEADERS = ("gpu", "name", "state", "used GB", "free GB", "total GB", "util %", "°C", "W", "models")


@click.command("gpus")
@where
@click.option("--processes", is_flag=True, help="Also list the processes on each GPU.")
def gpus_command(config: Path | None, state_dir: Path | None, processes: bool) -> None:
    """Show the GPUs: memory (GB = 2^30 bytes), load, temperature, power, and our models on them."""
    settings = load_settings(config, state_dir=state_dir)
    path = settings.state_dir / "state.db"
    if not path.exists():
        raise ManagerDown(f"no state file {path}: has `smartproxy serve` run with this state_dir?")
    store = Store(path)
    try:
        pool, manager, now = view.pool(store, settings), manager_row(store), store.now()
    finally:
        store.close_all()
    click.echo(gpu_table(pool.gpu_list) if pool.gpu_list else "no GPUs: models run on the CPU")
    if processes and pool.gpu_list:
        click.echo("\n" + process_table(pool.gpu_list))
    click.echo("\n" + age_line(pool.observed_at, manager.mode_reason, now=now))


def gpu_table(gpus: Sequence[GPU]) -> str:
    """Return one line a GPU; "-" where a card has no such reading; errors below their table."""
    lines = [
        (
            *(gpu.id, gpu.name, gpu.state.value),
            *(f"{size:.1f}" for size in (gpu.used_memory, gpu.free_memory, gpu.total_memory)),
            f"{gpu.utilization:.0f}",
            *(_whole(gpu.temperature), _whole(gpu.power_usage)),
            ", ".join(gpu.assigned_models) or "-",
        )
        for gpu in gpus
    ]
    table = tabulate(lines, HEADERS, disable_numparse=True, colalign=_alignment())
    errors = [f"gpu {gpu.id}: {gpu.error}" for gpu in gpus if gpu.error]
    return "\n".join([table, "", *errors] if errors else [table])


def process_table(gpus: Sequence[GPU]) -> str:
    """Return one line a process, the largest of each GPU first."""
    lines = [
        (gpu.id, process.pid, process.name or "-", _size(process))
        for gpu in gpus
        for process in sorted(gpu.processes, key=lambda entry: -(entry.used_memory or 0))
    ]
    return tabulate(lines, ("gpu", "pid", "process", "GB"), disable_numparse=True)


def age_line(observed_at: float | None, reason: str | None, *, now: float) -> str:
    """Return when the GPUs were last looked at (Unix seconds), and what there is to say of it."""
    if observed_at is None:
        return "the manager has not looked at the GPUs yet"
    age = f"seen {max(0.0, now - observed_at):.0f} s ago"
    return f"{age}; {reason}" if reason else age


def _alignment() -> list[str]:
    texts = {"name", "state", "models"}
    return ["left" if header in texts else "right" for header in HEADERS]


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _size(process: GPUProcess) -> str:
    return "-" if process.used_memory is None else f"{process.used_memory:.1f}"
