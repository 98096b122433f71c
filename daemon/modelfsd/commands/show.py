"""What the daemon's answers look like to people: tables for `status` and `info`.

The input is the answers' JSON, from a daemon that may be of another version: what is missing or
null is shown as a dash. Colours appear on a terminal only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, TextIO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelfsd.commands.registry import Entry
from modelfsd.printing import plain, plain_answer
from modelfsd.units import format_duration, format_size
from modelfsd.writing.lost import LostCopy

Shown = TypeVar("Shown")

PIPE_WIDTH = 240  # columns where there is no terminal: wide enough that no cell is cut
RANGES_SHOWN_MAX = 6


def _of_plain_text(view: Callable[[dict[str, Any]], Shown]) -> Callable[[dict[str, Any]], Shown]:
    """A view of an answer: it sees none of what might give orders to the terminal."""

    @wraps(view)
    def shown(answer: dict[str, Any]) -> Shown:
        return view(plain_answer(answer))

    return shown


def console(stream: TextIO | None = None) -> Console:
    """A console that takes text as it is: file names are not markup."""
    stream = sys.stdout if stream is None else stream
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


@_of_plain_text
def status_view(status: dict[str, Any]) -> RenderableType:
    """`modelfs status`."""
    cluster, node = _part(status, "cluster"), _part(status, "node")
    facts = _facts()
    facts.add_row("cluster", f"{_said(cluster.get('name'))} ({_said(cluster.get('id'))})")
    facts.add_row(
        "this node",
        f"{_said(node.get('name'))} ({_said(node.get('id'))}), pid {_said(node.get('pid'))}, "
        f"modelfs {_said(status.get('version'))}",
    )
    facts.add_row("mounted at", _said(status.get("mountpoint")))
    facts.add_row("state in", _said(status.get("state_dir")))
    facts.add_row(
        "holds",
        f"{_count(status.get('files'), 'file')}, "
        f"{_count(status.get('directories'), 'directory', 'directories')}, "
        f"{_size(status.get('bytes'))}, {_said(status.get('replicas'))} copies each",
    )
    facts.add_row("history", _count(status.get("retained_versions"), "retained version"))
    lacking = status.get("chunks_under_replicated")
    if lacking is None:
        copies = Text("not counted yet", style="dim")
    elif lacking:
        copies = Text(f"{_count(lacking, 'chunk')} with too few copies", style="yellow")
    else:
        copies = Text("complete", style="green")
    facts.add_row("copies", copies)
    facts.add_row("upkeep", _upkeep_line(_part(status, "upkeep")))
    facts.add_row("scrub", _scrub_line(_part(status, "scrub")))
    facts.add_row("etcd", _etcd_line(_part(status, "etcd")))
    if isinstance(ends := status.get("certificate_ends_at"), int | float):
        facts.add_row("certificate", f"until {_time(int(ends * 1e9))}, renewed before that")
    parts: list[RenderableType] = [facts, _nodes_table(status.get("nodes") or [])]
    if limits := status.get("limits"):
        facts.add_row("limits", "; ".join(map(_said, limits)))
    for path in status.get("damaged_files") or []:
        facts.add_row("damaged", Text(_said(path), style="red"))
    if (
        count := (status.get("damaged_file_count") or 0) - len(status.get("damaged_files") or [])
    ) > 0:
        facts.add_row("damaged", f"... and {_count(count, 'file')} more")
    for chunk in status.get("lost_chunks") or []:
        paths = ", ".join(map(_said, chunk.get("paths") or []))
        text = f"chunk {_said(chunk.get('chunk'))[:16]} of {paths}: {_said(chunk.get('reason'))}"
        facts.add_row("lost", Text(text, style="red"))
    for record in status.get("unreadable_records") or []:
        facts.add_row("unreadable", f"{_said(record.get('key'))}: {_said(record.get('reason'))}")
    parts += [Text(f"warning: {warning}", style="yellow") for warning in status.get("warnings", [])]
    return Group(*parts)


def _upkeep_line(upkeep: dict[str, Any]) -> str:
    line = f"gave back {_size(upkeep.get('freed_bytes'))}"
    if upkeep.get("waiting_chunks"):
        line += f" ({_count(upkeep['waiting_chunks'], 'chunk')} to go when their grace is over)"
    line += f", made {_count(upkeep.get('copied_chunks'), 'missing copy', 'missing copies')}"
    if upkeep.get("heal_failures"):
        line += f" ({_said(upkeep['heal_failures'])} to be tried again)"
    return line


def _scrub_line(scrub: dict[str, Any]) -> str:
    if not scrub:
        return "-"
    if scrub.get("every_seconds"):
        done = f"{int(100 * (scrub.get('position') or 0))} % of this round"
        line = f"{done}, one every {format_duration(scrub['every_seconds'])}"
    else:
        line = "not in the background"
    last = scrub.get("completed_at")
    line += f"; last complete {_time(int(last * 1e9))}" if last else "; none was complete yet"
    bad = (scrub.get("bad_chunks") or 0) + (scrub.get("dropped_chunks") or 0)
    line += f"; {_count(bad, 'bad copy', 'bad copies')} since the start"
    if bad:
        line += f", {_said(scrub.get('restored_chunks'))} restored"
    if scrub.get("unreadable_chunks"):
        line += f"; {_count(scrub['unreadable_chunks'], 'chunk')} could not be looked at"
    return line


def _etcd_line(etcd: dict[str, Any]) -> Text:
    members = etcd.get("members") or []
    well = sum(bool(member.get("healthy")) for member in members)
    line = Text()
    if etcd.get("healthy"):
        line.append("healthy", style="green")
    else:
        line.append("no quorum: read-only", style="red")
    if members:
        line.append(f", {well} of {_count(len(members), 'member')} up")
    learners = [str(member.get("name")) for member in members if member.get("learner")]
    if learners:
        line.append(f" ({', '.join(learners)} still joining)")
    if etcd.get("endpoints"):
        line.append(f", at {', '.join(map(str, etcd['endpoints']))}")
    if etcd.get("quota_bytes"):
        line.append(f", {_size(etcd.get('db_bytes'))} of {_size(etcd['quota_bytes'])} used")
    if etcd.get("error"):
        line.append(f" - {etcd['error']}", style="red")
    return line


def _nodes_table(nodes: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("NODE", "ID", "ADDRESS", "ZONE", "STATE", "ETCD"):
        table.add_column(heading, no_wrap=True)
    for heading in ("USED", "DISK"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("VERSION", no_wrap=True)
    for node in nodes:
        state = Text("up", style="green") if node.get("up") else Text("DOWN", style="red")
        name = _said(node.get("name")) + (" *" if node.get("self") else "")
        table.add_row(
            Text(name),
            _said(node.get("id")),
            _said(node.get("address")),
            _said(node.get("zone") or None),
            state,
            "voter" if node.get("voter") else "client",
            _size(node.get("used_bytes")),
            _size(node.get("capacity_bytes")),
            _said(node.get("version")),
        )
    return table


@_of_plain_text
def info_view(info: dict[str, Any]) -> RenderableType:
    """`modelfs info PATH`."""
    facts = _facts()
    facts.add_row("path", _said(info.get("path")))
    facts.add_row("type", _said(info.get("type")))
    facts.add_row("inode", f"{_said(info.get('ino'))}, version {_said(info.get('version'))}")
    facts.add_row("size", _size(info.get("size")))
    facts.add_row("epoch", _said(info.get("epoch")))
    if info.get("inline"):
        facts.add_row("contents", "in the inode record, in etcd")
    elif info.get("chunk_count"):
        facts.add_row(
            "contents",
            f"{_count(info['chunk_count'], 'chunk')} of up to {_size(info.get('chunk_bytes'))}, "
            f"{_said(info.get('replicas'))} copies each",
        )
        facts.add_row("manifest", _said(info.get("manifest")))
    lacking = info.get("under_replicated")
    if lacking:
        facts.add_row("copies", Text(f"{_count(lacking, 'chunk')} with too few", style="yellow"))
    nodes = info.get("nodes") or []
    return Group(facts, _holders_table(nodes)) if nodes else facts


def _holders_table(nodes: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("NODE", "ID", "STATE"):
        table.add_column(heading, no_wrap=True)
    for heading in ("COPIES", "BYTES"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("CHUNKS")
    for node in nodes:
        table.add_row(
            _said(node.get("name")),
            _said(node.get("id")),
            Text("up", style="green") if node.get("up") else Text("DOWN", style="red"),
            _said(node.get("chunk_count")),
            _size(node.get("bytes")),
            _ranges(node.get("chunks") or []),
        )
    return table


@_of_plain_text
def versions_view(answer: dict[str, Any]) -> RenderableType:
    """`modelfs info PATH --versions`."""
    facts = _facts()
    facts.add_row("path", _said(answer.get("path")))
    for gone in answer.get("removed_directories") or []:
        text = f"{_said(gone.get('path'))} was removed; its version is {_said(gone.get('number'))}"
        facts.add_row("directory", text)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("VERSION", justify="right", no_wrap=True)
    table.add_column("MODIFIED", no_wrap=True)
    table.add_column("SIZE", justify="right", no_wrap=True)
    for heading in ("TYPE", "UNTIL", "WHY", "NODE", "KEPT UNTIL"):
        table.add_column(heading, no_wrap=True)
    for version in answer.get("versions") or []:
        is_current = bool(version.get("current"))
        table.add_row(
            _said(version.get("number")),
            _time(version.get("mtime_ns")),
            _size(version.get("size")),
            _said(version.get("type")),
            Text("now", style="green") if is_current else _time(version.get("superseded_ns")),
            "current" if is_current else _said(version.get("why")),
            _said(version.get("node")),
            "" if is_current else _time(version.get("expires_ns")),
        )
    parts: list[RenderableType] = [facts, table]
    names, count = answer.get("gone_names") or [], answer.get("gone_name_count")
    if names:
        parts.append(Text(f"gone from here, and retained: {_count(count, 'name')}"))
        parts += [Text(f"  {_said(name)}") for name in names]
    return Group(*parts)


@_of_plain_text
def restored_text(answer: dict[str, Any]) -> str:
    """`modelfs restore PATH --version N`."""
    size = f" ({_size(answer.get('size'))})" if answer.get("type") == "file" else ""
    restored, number = _said(answer.get("restored")), _said(answer.get("number"))
    return f"restored version {restored} of {_said(answer.get('path'))} as version {number}{size}"


@_of_plain_text
def policy_view(answer: dict[str, Any]) -> RenderableType:
    """`modelfs policy PATH`."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text("path", style="bold"), _said(answer.get("path")), "")
    origins = _part(answer, "from")
    retain = answer.get("retain_seconds")
    for label, field, text in (
        ("replicas", "replicas", _said(answer.get("replicas"))),
        ("retain", "retain_seconds", "-" if retain is None else format_duration(retain)),
        ("chunk size", "chunk_bytes", _size(answer.get("chunk_bytes"))),
    ):
        origin = f"from {_said(origins.get(field))}"
        table.add_row(Text(label, style="bold"), text, Text(origin, style="dim"))
    return table


def _time(ns: object) -> str:
    """A time in nanoseconds since 1970, in this machine's zone, to the second."""
    if not isinstance(ns, int):
        return "-"
    try:
        return datetime.fromtimestamp(ns // 1_000_000_000).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "-"


def _ranges(ranges: Sequence[Sequence[int]]) -> str:
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:RANGES_SHOWN_MAX]]
    rest = len(ranges) - len(shown)
    return " ".join(shown) + (f" and {rest} more" if rest else "")


def lost_view(copies: Sequence[LostCopy]) -> RenderableType:
    """`modelfs recover --list`."""
    if not copies:
        return Text("nothing is lost")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("NAME", "PATH", "NODE", "WRITTEN"):
        table.add_column(heading, no_wrap=heading != "PATH", overflow="fold")
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("WHY", overflow="fold")
    for copy in copies:
        when = datetime.fromtimestamp(copy.written_at).strftime("%Y-%m-%d %H:%M:%S")
        why = f"{copy.why} (still open)" if copy.is_open else copy.why
        path, node = _said(copy.path or None), _said(copy.node or None)
        table.add_row(_said(copy.name), path, node, when, format_size(copy.size), _said(why))
    return table


def daemons_text(entries: Sequence[Entry]) -> str:
    """The daemons of this machine, one line each."""
    return "\n".join(
        f"  {_said(entry.mountpoint)}  ({_said(entry.name)}, pid {entry.pid})" for entry in entries
    )


def _facts() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _part(answer: dict[str, Any], key: str) -> dict[str, Any]:
    part = answer.get(key)
    return part if isinstance(part, dict) else {}


def _said(value: object) -> str:
    return "-" if value is None else plain(str(value))


def _size(value: object) -> str:
    return format_size(value) if isinstance(value, int) else "-"


def _count(value: object, noun: str, plural: str | None = None) -> str:
    if value is None:
        return f"- {plural or noun + 's'}"
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"
