"""What the benchmark found: the figures, how they are joined, and the tables that show them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from modelfs import __version__
from modelfsd import mounts
from modelfsd.commands import show
from tests.bench_curves import Curves, Row
from tests.bench_places import Place, machine_cpu
from tests.bench_stages import Micro
from tests.bench_work import Figures, Work


class Figure(NamedTuple):
    """A row of the table. Speeds have CPU seconds for each GiB beside them, rates and times
    CPU milliseconds for each operation.
    """

    text: str
    unit: str
    higher_is_better: bool

    @property
    def cpu_unit(self) -> str:
        """In what its CPU time is told."""
        return "s/GiB" if self.unit == "GB/s" else "ms"


def _speed(text: str) -> Figure:
    return Figure(text, "GB/s", True)


def _rate(text: str) -> Figure:
    return Figure(text, "1/s", True)


PLAIN = "_with_data-tls_off"  # what rows of the cluster that does not encrypt are filed under
PLAIN_TEXT = "... with --data-tls off"
FIGURES = {
    "write": _speed("write, close and fsync"),
    f"write{PLAIN}": _speed(PLAIN_TEXT),
    "read_cold": _speed("read, all caches cold"),
    f"read_cold{PLAIN}": _speed(PLAIN_TEXT),
    "read_client_cold": _speed("read, client-cold"),
    f"read_client_cold{PLAIN}": _speed(PLAIN_TEXT),
    "read_warm": _speed("read again, a second open"),
    "read_warm_requests": Figure("... requests to the daemon", "", False),
    "read_local_replica": _speed("read from the local replica, cold"),
    "raw_client_cold": _speed("plain read, client-cold"),
    "np_load_client_cold": _speed("np.load, client-cold"),
    "safetensors_client_cold": _speed("safetensors load_file, client-cold"),
    "torch_load_client_cold": _speed("torch.load, client-cold"),
    "torch_load_mmap_client_cold": _speed("torch.load(mmap=True), copied, client-cold"),
    "mmap_in_order_client_cold": _speed("mmap in file order, client-cold"),
    "mmap_page_client_cold": Figure("mmap, random 4 KiB page, client-cold", "ms", False),
    "strided_client_cold": _speed("256 KiB of every 8 MiB, client-cold"),
    "read_4_files_client_cold": _speed("4 processes read 4 files, client-cold"),
    "read_1_file_by_8_client_cold": _speed("8 processes read one file, client-cold"),
    "create": _rate("create, write 4 KiB, close"),
    "create_8": _rate("... by 8 processes in one directory"),
    "create_8_apart": _rate("... by 8 processes, each in its own"),
    "open_read": _rate("open and read 4 KiB, client-cold"),
    "open_read_8": _rate("... by 8 processes in one directory"),
    "stat_warm": _rate("stat of a known file"),
    "list_cold": _rate("ls -l, client-cold"),
    "list_warm": _rate("ls -l again"),
    "rename": _rate("rename"),
    "rename_8": _rate("... by 8 processes in one directory"),
    "rename_8_apart": _rate("... by 8 processes, each in its own"),
    "unlink": _rate("unlink"),
    "unlink_8": _rate("... by 8 processes in one directory"),
    "unlink_8_apart": _rate("... by 8 processes, each in its own"),
    "visible_new": Figure("a new file is seen by another node", "ms", False),
    "visible_rewritten": Figure("new contents are seen by another node", "ms", False),
}


@dataclass
class Results:
    """Every figure of every repetition, by place."""

    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    notes: dict[str, str] = field(default_factory=dict)  # by figure: why there is none
    left_out: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)  # by group: of the nodes, added up
    micro: dict[str, Micro] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)

    def note(self, place: Place, figures: Figures) -> None:
        """Take what a step has measured at a place."""
        for name, value in figures.items():
            figure = name.removesuffix("_cpu")
            row = f"{figure}{place.suffix}{name.removeprefix(figure)}"
            self.values[row][place.name].append(value)

    def of(self, figure: str, place: str) -> list[float]:
        """Of all repetitions. The others are what they are without our encryption, too."""
        rows = self.values[figure]
        return rows[place] or (self.values[figure.replace(PLAIN, "")][place] if rows else [])

    def median(self, figure: str, place: str) -> float | None:
        """Of the repetitions."""
        found = self.of(figure, place)
        return statistics.median(found) if found else None

    def ratio(self, figure: str, place: str, to: str) -> float | None:
        """The median of the repetitions' own ratios."""
        pairs = zip(self.of(figure, place), self.of(figure, to), strict=False)
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
    """One line for each figure; the CPU time stands beside the speed that it bought."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("", no_wrap=True)
    ours, local, *peers = places
    for heading in (ours, "CPU", local, "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for peer in peers:
        for heading in (peer, "CPU", "ours/theirs"):
            table.add_column(heading, justify="right", no_wrap=True)
    for figure, told in FIGURES.items():
        if figure in results.notes:
            table.add_row(f"{told.text}: {results.notes[figure]}")
        if not any(results.values[figure].values()):
            continue

        def cpu(place: str, figure: str = figure, unit: str = told.cpu_unit) -> str:
            return _number(results.median(f"{figure}_cpu", place), unit)

        cells = [told.text, told.unit, _number(results.median(figure, ours)), cpu(ours)]
        cells.append(_number(results.median(figure, local)))
        cells.append(_number(results.ratio(figure, ours, local)))
        for peer in peers:
            cells += [_number(results.median(figure, peer)), cpu(peer)]
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


def micro_table(micro: dict[str, Micro]) -> Table:
    """The stages by themselves."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("BY ITSELF")
    for heading in ("", "CPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in micro.items():
        cells = (_number(found.value, found.unit), _number(found.cpu, found.cpu_unit))
        table.add_row(name, *cells)
    return table


def curve_table(name: str, rows: list[Row]) -> Table:
    """How a cost grows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(name.upper())
    for heading in rows[0]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row("", *map(_number, row.values()))
    return table


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{number} {unit}".rstrip()


def as_json(results: Results, places: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for programs."""
    figures = {}
    for name in list(results.values):
        told = FIGURES.get(name) or FIGURES[name.removesuffix("_cpu")]
        is_cpu = name not in FIGURES
        figures[name] = {
            "unit": told.cpu_unit if is_cpu else told.unit,
            "higher_is_better": told.higher_is_better and not is_cpu,
            "values": {place: results.of(name, place) for place in places},
            "medians": {place: results.median(name, place) for place in places},
            "ratios": {place: results.ratio(name, places[0], place) for place in places[1:]},
        }
    return {
        "environment": facts,
        "figures": figures,
        "notes": results.notes,
        "stages": results.stages,
        "micro": {name: asdict(found) for name, found in results.micro.items()},
        "curves": results.curves,
        "left_out": results.left_out,
        "errors": results.errors,
    }


def report(results: Results, places: list[str], facts: dict[str, Any], path: str | None) -> None:
    """Print the tables; write everything to `path`, if that is wanted."""
    output = show.console()
    tables = [table_of(results, places)] if results.values else []
    tables += [micro_table(results.micro)] if results.micro else []
    tables += [curve_table(name, rows) for name, rows in results.curves.items()]
    tables += [stages_table(results)] if results.stages else []
    for table in tables:
        output.print(table, Text(), sep="\n")
    output.print(Text(", ".join(f"{key} {value}" for key, value in facts.items())))
    for line in results.left_out:
        output.print(Text(f"left out, as time ran out: {line}", style="yellow"))
    for line in results.errors:
        output.print(Text(f"failed: {line}", style="red"))
    if path:
        Path(path).write_text(json.dumps(as_json(results, places, facts), indent=1) + "\n")
