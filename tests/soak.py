"""The soak: writers and readers on the same files on three nodes, for as long as one likes.

`./run soak --minutes 10` on a healthy lab; with `--faults` one node at a time is killed or paused,
and started again, at random. See `soak_workers` for what is written and what readers demand.

Beside the workers a watchdog looks, once a second, for what must not be: a thread in one
uninterruptible wait for more than 15 s, a daemon whose memory grows beyond a bound, a WARNING or
ERROR in a log of a healthy lab. At the end every file is compared through all mounts, and no
commit that was acknowledged may be missing. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from modelfs.limits import PUT_PATIENCE_SECONDS
from modelfsd.lab import processes as lab_processes
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.soak_workers import FILES, Board, Torn, create_files, number_in

ROOT = Path(__file__).parents[1]
STUCK_SECONDS_MAX = 15.0  # of one wait: an fsync on a disk that others use takes seconds
# Who reads a file on the node that commits it waits for the commit, and that waits for a peer that
# is silent until it is known to be dead, or for as long as a put is given (limits.py).
STUCK_BY_FAULT_SECONDS_MAX = STUCK_SECONDS_MAX + PUT_PATIENCE_SECONDS
DAEMON_BYTES_MAX = 1 << 30
FAULT_SECONDS = (3.0, 12.0)  # how long a node is away
HEALTHY_SECONDS = (5.0, 15.0)  # and how long it is there between two faults
GRACE_SECONDS = 60.0  # for the end: workers stop, nodes come back
CHECK_SECONDS = 60.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ROLES = ("writer", "reader", "reader")


@dataclass(slots=True)
class Findings:
    """What the soak has seen so far."""

    problems: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    versions: int = 0
    longest_gap: tuple[float, str] = (0.0, "")
    daemon_bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def problem(self, text: str) -> None:
        """Note what must not be, once."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        if len(self.problems) < 100:
            self.problems.append(line)
            print(f"PROBLEM {line}", file=sys.stderr, flush=True)


class WorkerProcess:
    """One worker, started again while there is time if a fault killed it (SIGBUS of an mmap)."""

    def __init__(self, role: str, node: LabNode, number: int, place: tuple[Path, Path]) -> None:
        self.role, self.node, self.number, self.place = role, node, number, place
        self.reports: list[dict[str, Any]] = []  # the last one of each process
        self.deaths: list[int] = []
        self.process: subprocess.Popen[str] | None = None
        self.listener: Thread | None = None

    def start(self, seconds: float, seed: int) -> None:
        """Start it; a thread keeps its last report."""
        directory, board = self.place
        command = [sys.executable, "-m", "tests.soak_workers", self.role, str(directory)]
        command += [str(board), str(self.node.index - 1), f"{seed} {self.number}", str(seconds)]
        paths = [str(ROOT), str(ROOT / "daemon"), *os.environ.get("PYTHONPATH", "").split(":")]
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd="/", env=environment
        )
        self.listener = Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        self.reports.append({})
        place = len(self.reports) - 1
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.reports[place] = json.loads(line)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.role} {self.number} on {self.node.name}"


class Soak:
    """One run on one lab."""

    def __init__(self, lab: Lab, seconds: float, seed: int, with_faults: bool) -> None:
        self.lab, self.seconds, self.seed, self.with_faults = lab, seconds, seed, with_faults
        self.chance = random.Random(f"faults {seed}")
        self.findings = Findings()
        self.away: set[str] = set()
        # (pid, thread, how often it has waited) -> since when in D state
        self.waiting: dict[tuple[int, int, int], float] = {}
        self.log_places = {node.name: node.log_path.stat().st_size for node in lab.nodes}
        self.workers: list[WorkerProcess] = []

    def run(self) -> Findings:
        """Start everything, watch it, end it, and check what is left."""
        with tempfile.TemporaryDirectory(prefix="modelfs-soak-") as outside:
            board = Path(outside, "board")
            directory = Path(tempfile.mkdtemp(prefix="soak-", dir=self.lab.nodes[0].mount)).name
            create_files(self.lab.nodes[0].mount / directory, board)
            places = [(node, (node.mount / directory, board)) for node in self.lab.nodes]
            self.workers = [
                WorkerProcess(role, node, len(ROLES) * index + number, place)
                for index, (node, place) in enumerate(places)
                for number, role in enumerate(ROLES)
            ]
            end = time.monotonic() + self.seconds
            try:
                for worker in self.workers:
                    worker.start(self.seconds, self.seed)
                self._watch(end)
                self._finish()
            finally:
                for worker in self.workers:
                    if worker.process is not None and worker.process.poll() is None:
                        worker.process.kill()
            self._collect()
            self._check(directory, Board(board))
        return self.findings

    # ------------------------------------------------------------ while it runs

    def _watch(self, end: float) -> None:
        next_fault = time.monotonic() + self.chance.uniform(*HEALTHY_SECONDS)
        with ThreadPoolExecutor(1) as pool:
            fault = None
            while (now := time.monotonic()) < end:
                self._look()
                if fault is not None and fault.done():
                    fault.result()
                    fault = None
                    next_fault = now + self.chance.uniform(*HEALTHY_SECONDS)
                if self.with_faults and fault is None and now > next_fault:
                    next_fault = end
                    fault = pool.submit(self._fault)
                self._restart_dead(end - now)
                time.sleep(1)

    def _fault(self) -> None:
        """Take one node away for a while, in one of two ways."""
        node = self.chance.choice(self.lab.nodes)
        kind = self.chance.choice(("kill", "pause"))
        seconds = self.chance.uniform(*FAULT_SECONDS)
        print(f"{time.strftime('%H:%M:%S')} {kind} {node.name} for {seconds:.0f} s", flush=True)
        self.findings.faults[kind] += 1
        self.away.add(node.name)
        getattr(self.lab, kind)(node.name)
        time.sleep(seconds)
        self.lab.start(node.name)
        self.lab.wait_for_mesh()
        print(f"{time.strftime('%H:%M:%S')} {node.name} is back", flush=True)
        self.away.discard(node.name)

    def _restart_dead(self, seconds: float) -> None:
        for worker in self.workers:
            process = worker.process
            if process is None or process.poll() is None or seconds < 2:
                continue
            if process.returncode == 0:
                self._drain(worker)
            elif not self.with_faults:
                self.findings.problem(f"{worker.name} died with {process.returncode}")
            else:
                worker.deaths.append(process.returncode)
                worker.start(seconds, self.seed + len(worker.deaths))
                continue
            worker.process = None

    def _drain(self, worker: WorkerProcess) -> None:
        """A worker that ended early has found something."""
        for text in worker.reports[-1].get("torn", []):
            self.findings.problem(f"{worker.name}: {text}")

    def _look(self) -> None:
        self._look_for_stuck()
        for node in self.lab.nodes:
            if (pid := node.pid) is not None:
                self._look_at_memory(node.name, pid)
            self._look_at_log(node)

    def _look_for_stuck(self) -> None:
        owners = {
            worker.process.pid: worker.name
            for worker in self.workers
            # Who reads from a node that is paused waits for it, as it must.
            if worker.process is not None
            and worker.process.poll() is None
            and worker.node.name not in self.away
        }
        for node in self.lab.nodes:
            owners |= dict.fromkeys(lab_processes.find([node.mark]), node.name)
        names = {node.name for node in self.lab.nodes}
        now, still = time.monotonic(), {}
        for pid, owner in owners.items():
            for thread, count in _threads_waiting(pid):
                wait = (pid, thread, count)
                since = still[wait] = self.waiting.get(wait, now)
                of_worker = self.with_faults and owner not in names
                if now - since > (STUCK_BY_FAULT_SECONDS_MAX if of_worker else STUCK_SECONDS_MAX):
                    what = _text_of(Path(f"/proc/{pid}/task/{thread}/wchan"))
                    self.findings.problem(f"{owner} waits for {now - since:.0f} s in D: {what}")
        self.waiting = still

    def _look_at_memory(self, name: str, pid: int) -> None:
        words = _text_of(Path(f"/proc/{pid}/statm")).split()
        if words:
            resident = int(words[1]) * PAGE_BYTES
            self.findings.daemon_bytes[name].append(resident)
            if resident > DAEMON_BYTES_MAX:
                self.findings.problem(f"the daemon of {name} has {resident >> 20} MiB")

    def _look_at_log(self, node: LabNode) -> None:
        with node.log_path.open("rb") as log:
            log.seek(self.log_places[node.name])
            *lines, _ = log.read().split(b"\n")
        self.log_places[node.name] += sum(len(line) + 1 for line in lines)
        for line in lines:
            text = line.decode(errors="replace")
            is_bug = "a bug in" in text or "Traceback" in text
            if is_bug or (not self.with_faults and (" WARNING " in text or " ERROR " in text)):
                self.findings.problem(f"log of {node.name}: {text}")

    # ------------------------------------------------------------ at the end

    def _finish(self) -> None:
        """Wait for the workers; one that does not end is a hang."""
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self.workers:
            if worker.process is None:
                continue
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.findings.problem(f"{worker.name} does not end")
                continue
            if worker.listener is not None:
                worker.listener.join(GRACE_SECONDS)  # its last report
        self._look()

    def _collect(self) -> None:
        found = self.findings
        for worker in self.workers:
            for report in worker.reports:
                found.done += Counter(report.get("done", {}))
                for what, count in report.get("failed", {}).items():
                    found.failed[f"{worker.role} {what}"] += count
                found.versions += report.get("versions", 0)
                gap, when = report.get("longest_gap", (0.0, ""))
                found.longest_gap = max(found.longest_gap, (gap, f"{worker.name} {when}"))
            if worker.process is not None:  # ended just now
                self._drain(worker)
        for what, count in found.failed.items():
            # Nobody may see ESTALE, whatever happens; without faults only EBUSY is an answer.
            is_known = "ESTALE" not in what and (self.with_faults or "EBUSY" in what)
            if not is_known:
                found.problem(f"errno {what}: {count} times")

    def _check(self, directory: str, board: Board) -> None:
        """Every file must be the same through all mounts, and nothing acknowledged be missing."""
        if self.away:
            self.lab.wait_for_mesh()
        for name in FILES:
            ranks = set()
            for node in self.lab.nodes:
                path = node.mount / directory / name
                command = ["timeout", "-s", "KILL", f"{CHECK_SECONDS}", "cat", str(path)]
                done = subprocess.run(command, capture_output=True, check=False)
                try:
                    assert done.returncode == 0, done.stderr.decode() or "it hangs"
                    ranks.add(number_in(done.stdout, name))
                except (Torn, AssertionError) as error:
                    self.findings.problem(f"at the end, {name} on {node.name}: {error}")
            if len(ranks) > 1 or (ranks and max(ranks) < board.committed(name)):
                text = f"versions {ranks}, acknowledged {board.committed(name)}"
                self.findings.problem(f"at the end, {name}: {text}")


def _threads_waiting(pid: int) -> list[tuple[int, int]]:
    """The threads of a process that are in an uninterruptible wait, and how many waits they had.

    One that writes a log on a slow disk is in such a wait whenever one looks, but each time in
    another one.
    """
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    states = {
        thread: _text_of(Path(f"/proc/{pid}/task/{thread}/stat")).rpartition(")")[2][1:2]
        for thread in threads
    }
    return [
        (thread, _waits_of(Path(f"/proc/{pid}/task/{thread}/status")))
        for thread, state in states.items()
        if state == "D"
    ]


def _waits_of(path: Path) -> int:
    """How often a thread has given up its processor to wait for something."""
    _, _, rest = _text_of(path).partition("\nvoluntary_ctxt_switches:")
    return int(rest.split(None, 1)[0]) if rest else -1


def _text_of(path: Path) -> str:
    """What a file of /proc says; nothing if its process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def show(findings: Findings) -> None:
    """The figures."""
    for title, counts in (("done", findings.done), ("failed", findings.failed)):
        print(f"{title}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print(f"faults: {dict(findings.faults)}; versions seen by readers: {findings.versions}")
    gap, where = findings.longest_gap
    print(f"longest gap: {gap:.1f} s ({where})")
    for name, sizes in sorted(findings.daemon_bytes.items()):
        middle, last, most = (
            size >> 20 for size in (sizes[len(sizes) // 2], sizes[-1], max(sizes))
        )
        print(f"{name}: {middle} MiB half way, {last} at the end, {most} at most")
    print(f"problems: {len(findings.problems)}")


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="./run soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default 5)")
    parser.add_argument("--faults", action="store_true", help="kill and pause nodes meanwhile")
    parser.add_argument("--seed", type=int, default=0, help="of operations and faults")
    parser.add_argument("--root", help="for the lab (default: a new directory, removed at the end)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="modelfs-soak-lab-") as default:
        root = Path(options.root or default, "lab")
        with Lab.up(root, 3, show=lambda line: print(line, file=sys.stderr)) as lab:
            findings = Soak(lab, options.minutes * 60, options.seed, options.faults).run()
            show(findings)
            if findings.problems and options.root:
                for node in lab.nodes:  # they would go with the lab
                    kept = Path(options.root, f"{node.name}.log")
                    kept.write_bytes(node.log_path.read_bytes())
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
