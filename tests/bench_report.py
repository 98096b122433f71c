"""What the benchmark found: the figures, how they are joined, and the tables that show them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from modelfs import __version__
from modelfsd import mounts
from modelfsd.commands import show
from tests.bench_places import machine_cpu
from tests.bench_work import Work

# figure -> (what it says, unit, whether more is better)
FIGURES = {
    "write": ("write, close and fsync", "GB/s", True),
    "read_cold": ("read, all caches cold", "GB/s", True),
    "read_client_cold": ("read, client-cold", "GB/s", True),
    "read_warm": ("read again, a second open", "GB/s", True),
    "read_warm_requests": ("... requests to the daemon", "", False),
    "read_local_replica": ("read from the local replica, cold", "GB/s", True),
    "raw_client_cold": ("plain read, client-cold", "GB/s", True),
    "np_load_client_cold": ("np.load, client-cold", "GB/s", True),
    "safetensors_client_cold": ("safetensors load_file, client-cold", "GB/s", True),
    "mmap_in_order_client_cold": ("mmap in file order, client-cold", "GB/s", True),
    "mmap_page_client_cold": ("mmap, random 4 KiB page, client-cold", "ms", False),
    "read_4_files_client_cold": ("4 processes read 4 files, client-cold", "GB/s", True),
    "read_1_file_by_8_client_cold": ("8 processes read one file, client-cold", "GB/s", True),
    "create": ("create, write 4 KiB, close", "1/s", True),
    "create_8": ("... by 8 processes", "1/s", True),
    "open_read": ("open and read 4 KiB, client-cold", "1/s", True),
    "open_read_8": ("... by 8 processes", "1/s", True),
    "stat_warm": ("stat of a known file", "1/s", True),
    "list_cold": ("ls -l, client-cold", "1/s", True),
    "list_warm": ("ls -l again", "1/s", True),
    "rename": ("rename", "1/s", True),
    "rename_8": ("... by 8 processes", "1/s", True),
    "unlink": ("unlink", "1/s", True),
    "unlink_8": ("... by 8 processes", "1/s", True),
    "visible_new": ("a new file is seen by another node", "ms", False),
    "visible_rewritten": ("new contents are seen by another node", "ms", False),
}


@dataclass
class Results:
    """Every figure of every repetition, by place."""

    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    left_out: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)  # by group: of the nodes, added up
    micro: dict[str, float] = field(default_factory=dict)

    def median(self, figure: str, place: str) -> float | None:
        """Of the repetitions."""
        found = self.values[figure][place]
        return statistics.median(found) if found else None

    def ratio(self, figure: str, place: str, to: str) -> float | None:
        """The median of the repetitions' own ratios."""
        pairs = zip(self.values[figure][place], self.values[figure][to], strict=False)
        ratios = [one / other for one, other in pairs if other]
        return statistics.median(ratios) if ratios else None


def environment(directory: Path, work: Work, repetitions: int) -> dict[str, Any]:
    """What the figures depend on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    mount = max(
        (found for found in mounts.mounts() if directory.is_relative_to(found.mountpoint)),
        key=lambda found: len(found.mountpoint),
    )
    busy, started = machine_cpu(), time.monotonic()
    time.sleep(1.0)
    etcd = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=False)
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "kernel": platform.release(),
        "cpus": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk": f"{mount.type} at {mount.mountpoint}",
        "python": platform.python_version(),
        "modelfs": __version__,
        "pyfuse3": version("pyfuse3"),
        "etcd": etcd.stdout.partition("\n")[0].rpartition(" ")[2],
        "nodes": 3,
        "replicas": 2,
        "size_mib": work.size_mib,
        "small_files": work.small_files,
        "repetitions": repetitions,
        "busy_before_cores": round((machine_cpu() - busy) / (time.monotonic() - started), 2),
    }


def table_of(results: Results, places: list[str]) -> Table:
    """One line for each figure; the CPU seconds stand beside the speed that they bought."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("", no_wrap=True)
    ours, local, *peers = places
    for heading in (ours, "CPU s/GiB", local, "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for peer in peers:
        for heading in (peer, "CPU s/GiB", "ours/theirs"):
            table.add_column(heading, justify="right", no_wrap=True)
    for figure, (text, unit, _) in FIGURES.items():
        if not any(results.values[figure].values()):
            continue
        cells = [text, unit, _number(results.median(figure, ours))]
        cells.append(_number(results.median(f"{figure}_cpu", ours)))
        cells.append(_number(results.median(figure, local)))
        cells.append(_number(results.ratio(figure, ours, local)))
        for peer in peers:
            cells.append(_number(results.median(figure, peer)))
            cells.append(_number(results.median(f"{figure}_cpu", peer)))
            cells.append(_number(results.ratio(figure, ours, peer)))
        table.add_row(*cells)
    return table


def stages_table(results: Results) -> Table:
    """Which stage took how long, by group."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("GROUP", "STAGE"):
        table.add_column(heading, no_wrap=True)
    for heading in ("COUNT", "P50 ms", "P99 ms", "ALL s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, stages in results.stages.items():
        for name, told in stages.items():
            times = [_number(told[share] * 1e3) for share in ("p50", "p99")]
            table.add_row(group, name, f"{told['count']:,}", *times, _number(told["seconds"]))
    return table


def micro_table(micro: dict[str, float]) -> Table:
    """The stages by themselves."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("BY ITSELF")
    for heading in ("GB/s", "CPU s/GiB"):
        table.add_column(heading, justify="right")
    for name, value in micro.items():
        if not name.endswith("_cpu"):
            table.add_row(name, _number(value), _number(micro[f"{name}_cpu"]))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_json(results: Results, places: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for programs."""
    figures = {
        figure: {
            "unit": FIGURES[figure][1] if figure in FIGURES else "s/GiB",
            "higher_is_better": figure in FIGURES and FIGURES[figure][2],
            "values": {place: results.values[figure][place] for place in places},
            "medians": {place: results.median(figure, place) for place in places},
            "ratios": {place: results.ratio(figure, places[0], place) for place in places[1:]},
        }
        for figure in list(results.values)
    }
    return {
        "environment": facts,
        "figures": figures,
        "stages": results.stages,
        "micro": results.micro,
        "left_out": results.left_out,
        "errors": results.errors,
    }


def report(results: Results, places: list[str], facts: dict[str, Any], path: str | None) -> None:
    """Print the tables; write everything to `path`, if that is wanted."""
    output = show.console()
    output.print(table_of(results, places))
    if results.micro:
        output.print(Text(), micro_table(results.micro), sep="\n")
    output.print(Text(), stages_table(results), sep="\n")
    output.print(Text("\n" + ", ".join(f"{key} {value}" for key, value in facts.items())))
    for line in results.left_out:
        output.print(Text(f"left out, as time ran out: {line}", style="yellow"))
    for line in results.errors:
        output.print(Text(f"failed: {line}", style="red"))
    if path:
        Path(path).write_text(json.dumps(as_json(results, places, facts), indent=1) + "\n")
