"""`modelfs scrub` and `modelfs fsck`: asking a daemon to look, and showing what it found.

Exit codes are those of fsck(8), for both:

    0   all is well; for `scrub` also: what was bad has been repaired
    1   `fsck` found errors, and has mended all of them
    4   something is left that could not be mended, or was not to be
    8   the check could not be carried out, or not all of it

and as with every command 2 for a wrong command line, 130 after ^C. Nothing is half done then: the
daemon stops when the command is gone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from modelfs.errors import UserError
from modelfsd.commands import show
from modelfsd.commands.asking import choose_daemon
from modelfsd.commands.control import call_long
from modelfsd.commands.registry import Registry
from modelfsd.printing import complain, plain, plain_answer
from modelfsd.units import format_duration, format_size, parse_size

EXIT_CLEAN, EXIT_MENDED, EXIT_LEFT, EXIT_FAILED = 0, 1, 4, 8
RANGES_SHOWN_MAX = 8
SILENCE_SECONDS = 60.0  # the daemon tells of its progress every second, unless its disk hangs

Answer = dict[str, Any]

Mountpoint = Annotated[
    str | None, typer.Argument(help="Which, if several nodes run here.", show_default=False)
]
StateDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="The node with this state directory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def carry_out(
    control: Path, command: str, on_news: Callable[[Answer], None], /, **arguments: object
) -> Answer:
    """Have a daemon carry out a command that takes long; returns its reply."""
    for is_reply, answer in call_long(control, command, SILENCE_SECONDS, **arguments):
        if is_reply:
            return answer
        on_news(answer)
    raise AssertionError("a long command ends with a reply or an error")


class ProgressLine:
    """How far a command is, on a terminal's last line; nothing where there is no terminal."""

    def __init__(self, what: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=show.console(sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=None, text="")

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int | None, text: str) -> None:
        """What is done by now."""
        self._progress.update(self._task, completed=done, total=total, text=plain(text))

    def print(self, line: RenderableType) -> None:
        """A line above it, on standard output where that is no terminal."""
        if sys.stdout.isatty():
            self._progress.console.print(line)
        else:
            show.console().print(line)


def _choose(mountpoint: str | None, state_dir: str | None) -> Path:
    return choose_daemon(Registry(), state_dir, mountpoint)


# ---------------------------------------------------------------- scrub


def scrub(
    mountpoint: Mountpoint = None,
    rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Read no more in a second: 50MiB.")
    ] = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Read and verify every chunk on this node's disk, and repair what is bad from other nodes."""
    rate_bytes = parse_size(rate) if rate is not None else 0
    try:
        control = _choose(mountpoint, state_dir)
        with ProgressLine("scrub") as line:
            answer = carry_out(control, "scrub", lambda news: _show(line, news), rate=rate_bytes)
    except UserError as error:
        complain("modelfs", error)
        raise typer.Exit(EXIT_FAILED) from error
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        show.console().print(scrub_view(answer))
    raise typer.Exit(scrub_code(answer))


def scrub_code(answer: Answer) -> int:
    """The exit code of a scrub that came to its end."""
    is_well = not (answer["unrepaired_chunks"] or answer["unreadable_chunks"])
    return EXIT_CLEAN if is_well else EXIT_LEFT


def _show(line: ProgressLine, news: Answer) -> None:
    progress = news.get("progress") or {}
    with suppress(KeyError):
        done, total = progress["bytes"], max(progress["bytes"], progress["total_bytes"])
        text = f"{format_size(done)} of {format_size(total)}, {progress['bad_chunks']:,} bad"
        line.show(done, total, text)


def scrub_view(answer: Answer) -> RenderableType:
    """`modelfs scrub`."""
    answer = plain_answer(answer)
    seconds = max(float(answer["seconds"]), 1e-3)
    speed = format_size(int(answer["bytes"] / seconds))
    lines = [
        f"node {answer['node']}: {answer['chunks']:,} chunks ({format_size(answer['bytes'])}) "
        f"verified in {format_duration(seconds)} ({speed}/s), {answer['bad_chunks']:,} bad"
    ]
    for key, text in (
        ("repaired_chunks", "repaired from other nodes"),
        ("dropped_chunks", "dropped from the cache"),
        ("unneeded_chunks", "put aside, needed by no file"),
        ("unrepaired_chunks", "NOT repaired: there is no good copy within reach"),
        ("unreadable_chunks", "NOT looked at: the disk fails"),
    ):
        if answer[key]:
            lines.append(f"  {answer[key]:,} {text}")
    if answer["example"]:
        lines.append(f"    for example {answer['example']}")
    for one in answer["unrepaired"]:
        lines.append(f"    chunk {one['chunk'][:16]}: {one['reason']}")
        lines += [f"      in {path}" for path in one["paths"]]
    return Text("\n".join(lines))


# ---------------------------------------------------------------- fsck


def fsck(
    mountpoint: Mountpoint = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make missing copies, and mend what is no guess.")
    ] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Read every copy on every node too: takes long.")
    ] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Check the whole cluster: names, inodes, and the copies of every chunk of every version."""
    findings: list[Answer] = []
    try:
        control = _choose(mountpoint, state_dir)
        with ProgressLine("fsck") as line:

            def hear(news: Answer) -> None:
                if (finding := news.get("finding")) is None:
                    _show_check(line, news.get("progress") or {})
                elif as_json:
                    findings.append(finding)
                else:
                    line.print(finding_view(finding))

            answer = carry_out(control, "fsck", hear, repair=repair, data=data)
    except UserError as error:
        complain("modelfs", error)
        raise typer.Exit(EXIT_FAILED) from error
    if as_json:
        print(json.dumps({**answer, "findings": findings}, indent=2))
    else:
        show.console().print(fsck_view(answer))
    raise typer.Exit(fsck_code(answer))


def fsck_code(answer: Answer) -> int:
    """The exit code of a check that came to its end."""
    if answer["nodes_silent"]:
        return EXIT_FAILED
    if answer["left"]:
        return EXIT_LEFT
    return EXIT_MENDED if answer["mended"] else EXIT_CLEAN


def _show_check(line: ProgressLine, progress: Answer) -> None:
    with suppress(KeyError):
        wrong = progress["mended"] + progress["left"]
        text = f"{progress['versions']:,} versions, {progress['chunks']:,} chunks, {wrong:,} wrong"
        line.show(progress["inodes"], progress["total_inodes"], text)


def finding_view(finding: Answer) -> RenderableType:
    """One thing that is wrong: a line for each path."""
    finding = plain_answer(finding)
    version = finding.get("version", "current")
    text = finding["text"] if version == "current" else f"{version}: {finding['text']}"
    ranges = [f"{start}-{end - 1}" for start, end in finding.get("ranges", [])[:RANGES_SHOWN_MAX]]
    if ranges:
        more = finding.get("range_count", len(ranges)) - len(ranges)
        text += f"; bytes {', '.join(ranges)}" + (f" and {more} more ranges" if more else "")
    mended = "mended: " if finding["mended"] else ""
    lines = [f"{path}: {mended}{text}" for path in finding["paths"]] or [f"{mended}{text}"]
    return Text("\n".join(lines), style="green" if mended else "red")


def fsck_view(answer: Answer) -> RenderableType:
    """What `modelfs fsck` says at last."""
    answer = plain_answer(answer)
    lines = [
        f"checked {answer['inodes']:,} inodes and {answer['names']:,} names, "
        f"{answer['versions']:,} versions with {answer['chunks']:,} chunks "
        f"({format_size(answer['bytes'])}) in {format_duration(answer['seconds'])}"
    ]
    if answer["nodes_down"]:
        lines.append(f"down, and their copies not counted: {', '.join(answer['nodes_down'])}")
    for node, reason in answer["nodes_silent"].items():
        lines.append(f"NOT complete: {node} did not answer: {reason}")
    if answer["mended"] or answer["left"]:
        lines.append(f"{answer['mended']:,} mended, {answer['left']:,} left")
    else:
        lines.append("clean")
    return Text("\n".join(lines))


def add_commands(app: typer.Typer) -> None:
    """Make them part of the `modelfs` command."""
    app.command()(scrub)
    app.command()(fsck)
