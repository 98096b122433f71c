"""`./run bench`: how fast modelfs is here, beside the local disk and other file systems.

A lab of three nodes with two replicas, all on this machine, so every figure is the cost of all
nodes together; what encryption costs is told by a second one, which does without. Each step runs at
every place in turn, in alternating order, three times by default; the ratio that is shown is the
median of the repetitions' own ratios, which a noisy machine disturbs least. CPU time is the whole
machine's, for each GiB or operation: let nothing else run beside it.

It ends within ten minutes (twelve with a peer): when time runs out, repetitions and then groups are
left out, and the table says so. Everything is taken away in the end, also after a signal; `./run`
cleans up after one that was killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from modelfs.errors import ModelfsError, UserError
from modelfsd import mounts
from modelfsd.commands import control
from modelfsd.commands.stats import difference
from modelfsd.lab.cluster import Lab
from modelfsd.stages import Latencies
from tests import bench_curves, bench_gluster, bench_stages
from tests.bench_load import NO_TORCH, TORCH_ROWS, has_torch, loading
from tests.bench_places import Clock, LocalDisk, Modelfs, Place
from tests.bench_report import PLAIN, Results, environment, report
from tests.bench_small import small_files, visibility
from tests.bench_work import Step, Work, clear, local_replica, parallel, sequential

SECONDS_MAX = 570.0
PEER_SECONDS_MAX = 150.0  # more
ASK_SECONDS = 60.0
SIZES_ON_DISK = 16  # replicas, shards, the local copy, caches, some air
MICRO_MIB_MAX = 256

GROUPS: dict[str, Callable[[Work], Iterator[Step]]] = {
    "seq": sequential,
    "local": local_replica,
    "load": loading,
    "par": parallel,
    "vis": visibility,
    "small": small_files,
}
DATA_TLS_OFF_TOO = "seq"  # the group that a cluster without encryption takes part in

ExtraPlace = Callable[[], AbstractContextManager[Place]]


class Bench:
    """One run over several places. `plain` is one more, which is there for one group only."""

    def __init__(
        self, places: list[Place], plain: ExtraPlace, work: Work, repetitions: int, ends_at: float
    ) -> None:
        self.places, self.work, self.repetitions = places, work, repetitions
        self.results = Results()
        self._plain, self._ends_at = plain, ends_at

    def run(self, groups: list[str]) -> None:
        """Measure these groups, as far as time allows."""
        for group in groups:
            if time.monotonic() > self._ends_at:
                self.results.left_out.append(group)
                continue
            say(f"{group}: {(GROUPS[group].__doc__ or '').strip()}")
            started = time.monotonic()
            with ExitStack() as stack:
                places = [*self.places]
                if group == DATA_TLS_OFF_TOO:  # next to the one that it is compared with
                    places.insert(1, stack.enter_context(self._plain()))
                before = self._measures()
                self._run_group(group, places)
                self.results.stages[group] = _joined(self._measures(), before)
            say(f"{group}: took {time.monotonic() - started:.0f} s")

    def _run_group(self, group: str, all_places: list[Place]) -> None:
        for place in all_places:
            place.since = time.time()
        steps = {place: list(GROUPS[group](self.work)) for place in all_places}
        failed: set[Place] = set()
        took = 0.0
        for repetition in range(self.repetitions):
            if repetition and time.monotonic() + took > self._ends_at:
                self.results.left_out.append(f"{group}, from repetition {repetition + 1} on")
                break
            started = time.monotonic()
            places = all_places if repetition % 2 == 0 else all_places[::-1]
            for number in range(len(steps[places[0]])):
                for place in (place for place in places if place not in failed):
                    try:
                        self.results.note(place, steps[place][number](place, repetition))
                    except OSError as error:
                        self.results.errors.append(f"{group} on {place.title}: {error}")
                        failed.add(place)
            took = time.monotonic() - started
        for place in all_places:
            clear(place)

    def _measures(self) -> list[dict[str, Any]]:
        labs = [place.lab for place in self.places if isinstance(place, Modelfs)]
        nodes = [node for lab in labs for node in lab.nodes]
        return [control.call(node.control_path, "measures", ASK_SECONDS) for node in nodes]


def _joined(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, Any]:
    """The stages that all nodes together passed between two looks."""
    joined: dict[str, Latencies] = {}
    for one, other in zip(now, before, strict=True):
        for name, told in difference(one, other)["stages"].items():
            found = Latencies.from_json(told)
            joined[name] = joined[name] + found if name in joined else found
    return {name: found.as_json() for name, found in joined.items()}


# ---------------------------------------------------------------- beside no other place


def _stages(results: Results, place: Modelfs, work: Work, directory: Path) -> None:
    """Each stage by itself."""
    mib = min(work.size_mib, MICRO_MIB_MAX)
    results.micro = bench_stages.measure(mib, work.small_files, directory, place.lab)


def _curves(results: Results, place: Modelfs, work: Work, directory: Path) -> None:
    """How costs grow with sizes and numbers; not by default, as it takes minutes."""
    results.curves = bench_curves.measure(place, bench_curves.Sizes())


ALONE: dict[str, Callable[[Results, Modelfs, Work, Path], None]] = {
    "stages": _stages,
    "curves": _curves,
}


# ---------------------------------------------------------------- running


def run_bench(arguments: argparse.Namespace) -> int:
    """The exit code. Raises `ModelfsError`."""
    groups = arguments.only.split(",")
    if unknown := set(groups) - {*GROUPS, *ALONE}:
        known = ", ".join([*GROUPS, *ALONE])
        raise UserError(f"unknown: {', '.join(unknown)}; there are {known}")
    if os.geteuid() != 0:
        raise UserError("the benchmark drops the kernel's caches: run it as root")
    if arguments.torch and not has_torch():
        raise UserError("torch is not installed: ./run bench --torch installs it")
    seconds = SECONDS_MAX + (PEER_SECONDS_MAX if arguments.peer else 0)
    ends_at = time.monotonic() + seconds - 60.0  # for the last group, and to clean up
    work = Work(arguments.size_mib, arguments.small_files, 4 * arguments.small_files)
    directory = Path(
        tempfile.mkdtemp(prefix="modelfs-bench-", dir=os.environ.get("MODELFS_TEST_ROOT"))
    )
    with ExitStack() as stack:
        stack.callback(_remove, directory)
        needed = SIZES_ON_DISK * work.size_mib << 20
        if shutil.disk_usage(directory).free < needed:
            raise UserError(f"{directory} has too little room: set TMPDIR, or --size-mib to less")
        facts = environment(directory, work, arguments.reps)
        ours = _our_place(stack, directory, arguments)
        places = [ours, LocalDisk(directory / "local"), *_peers(stack, directory, arguments, facts)]
        plain = partial(_plain_place, directory, arguments.plain_lab)
        bench = Bench(places, plain, work, arguments.reps, ends_at)
        bench.run([group for group in GROUPS if group in groups])
        if "load" in groups and not has_torch():
            bench.results.notes |= dict.fromkeys(TORCH_ROWS, NO_TORCH)
        for group in (group for group in ALONE if group in groups):
            say(f"{group}: {ALONE[group].__doc__}")
            with Clock() as clock:
                ALONE[group](bench.results, ours, work, directory)
            say(f"{group}: took {clock.seconds:.0f} s")
    report(bench.results, [place.name for place in places], facts, arguments.json)
    return 1 if bench.results.errors else 0


@contextmanager
def _plain_place(directory: Path, running: str | None) -> Iterator[Place]:
    """A cluster like ours, but for `--data-tls off`."""
    with ExitStack() as stack:
        if running:
            lab = Lab.open(running)
        else:
            say("starting a second lab, with --data-tls off")
            lab = stack.enter_context(_new_lab(directory / "plain", ["--data-tls", "off"]))
        place = Modelfs(lab, directory.name, PLAIN)
        stack.callback(_remove, place.a)
        yield place


def _new_lab(root: Path, arguments: Sequence[str] = ()) -> Lab:
    return Lab.up(root, nodes=3, replicas=2, arguments=arguments)


def _our_place(stack: ExitStack, directory: Path, arguments: argparse.Namespace) -> Modelfs:
    if arguments.lab:
        lab = Lab.open(arguments.lab)
    else:
        say("starting a lab of three nodes")
        lab = stack.enter_context(_new_lab(directory / "lab"))
    place = Modelfs(lab, directory.name)
    stack.callback(_remove, place.a)
    return place


def _peers(
    stack: ExitStack, directory: Path, arguments: argparse.Namespace, facts: dict[str, Any]
) -> list[Place]:
    if not arguments.peer:
        return []
    say("setting up GlusterFS: a volume with two replicas over three nodes")
    gluster = bench_gluster.Gluster(directory / "gluster")
    stack.callback(gluster.down)
    gluster.up()
    facts["gluster"] = gluster.version
    return [gluster]


def say(line: str) -> None:
    """One line of progress."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def _remove(directory: Path) -> None:
    """Remove a directory, unless something is still mounted below it."""
    below = f"{directory}/"
    if not any(mount.mountpoint.startswith(below) for mount in mounts.mounts()):
        shutil.rmtree(directory, ignore_errors=True)


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Makes a signal clean up as the end does. A second one does not disturb that."""
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, signal.SIG_IGN)
    sys.exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description="How fast modelfs is here.")
    parser.add_argument("--size-mib", type=int, default=256, help="of a large file (%(default)s)")
    parser.add_argument("--small-files", type=int, default=400, help="4 KiB each (%(default)s)")
    parser.add_argument("--reps", type=int, default=3, help="repetitions (%(default)s)")
    every = ",".join([*GROUPS, "stages"])
    parser.add_argument(
        "--only", default=every, help="groups of figures (%(default)s); there also is: curves"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--torch", action="store_true", help="torch.load must take part")
    parser.add_argument("--peer", choices=["gluster"], help="measure this one side by side")
    parser.add_argument("--lab", metavar="DIR", help="use this running lab, and leave it")
    parser.add_argument("--plain-lab", metavar="DIR", help="and this one, with --data-tls off")
    return parser.parse_args()


def main() -> int:
    """The entry point of `python -m tests.bench`."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_on_signal)
    try:
        return run_bench(arguments)
    except ModelfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
