"""`modelfs stats`: how fast a node is and where its time goes, and how one file has been used.

Works on the answers of `modelfsd.commands.measures` alone. A rate is the difference of two answers
over the daemon's own clock between them; a quantile comes from the difference of two histograms, so
a live table shows what happened in its last interval, not since the start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from modelfs.errors import UserError
from modelfsd.commands import show
from modelfsd.commands.asking import ANSWER_SECONDS, ask_about, choose_daemon
from modelfsd.commands.control import call
from modelfsd.commands.registry import Registry
from modelfsd.printing import plain
from modelfsd.stages import NOTHING, STAGES, Latencies
from modelfsd.units import format_size

INTERVAL_SECONDS = 1.0
KINDS = (("requests", "REQUEST"), ("stages", "STAGE"))

Answer = dict[str, Any]


# ---------------------------------------------------------------- a node


def watch(ask: Callable[[], Answer], show_one: Callable[[Answer, Answer], None]) -> None:
    """Show the last second over and over, until interrupted."""
    before = ask()
    while True:
        time.sleep(INTERVAL_SECONDS)
        now = ask()
        show_one(now, before)
        before = now


def difference(now: Answer, before: Answer | None) -> Answer:
    """What happened between two answers of one daemon (None: since its start), per second."""
    seconds = now["time"] - before["time"] if before else 0.0
    result: Answer = {"node": now.get("node"), "seconds": seconds}
    for kind, _ in KINDS:
        result[kind] = {}
        for name, found in now.get(kind, {}).items():
            then = before.get(kind, {}).get(name) if before else None
            spent = Latencies.from_json(found).since(Latencies.from_json(then) if then else NOTHING)
            if spent.count:
                result[kind][name] = spent.as_json()
    flows = flow_bytes(now["counters"])
    if before:
        old = flow_bytes(before["counters"])
        flows = {name: value - old[name] for name, value in flows.items()}
    result["bytes"] = flows
    return result


def flow_bytes(counters: Answer) -> dict[str, int]:
    """The bytes that have passed through a node, by way."""
    peers = counters["peers"].values()
    return {
        "from this disk": counters["chunks"]["local_bytes"],
        "from peers": counters["chunks"]["remote_bytes"],
        "pushed into the kernel": counters["pushes"].get("bytes", 0),
        "to peers that read": counters["served"]["bytes_out"],
        "copies sent to peers": counters["sent_bytes"],
        "copies not sent, the peer had them": counters["spared_bytes"],
        "from and to peers, all in all": sum(peer["bytes_in"] + peer["bytes_out"] for peer in peers)
        + counters["served"]["bytes_in"]
        + counters["served"]["bytes_out"],
    }


def node_view(now: Answer, before: Answer | None = None) -> RenderableType:
    """Rates and latencies of one interval; without `before`, totals since the daemon's start."""
    spent = difference(now, before)
    seconds = spent["seconds"]
    period = f"the last {seconds:.1f} s" if before else "since the start"
    title = plain(f"node {now.get('node')}, {period}")
    parts: list[RenderableType] = [Text(title, style="bold")]
    for kind, heading in KINDS:
        table = _table(heading, "RATE" if before else "COUNT", "P50", "P90", "P99", "TIME", "")
        for name, found in spent[kind].items():
            latencies = Latencies.from_json(found)
            rate = f"{latencies.count / seconds:,.0f}/s" if before else f"{latencies.count:,}"
            busy = f"{latencies.seconds / seconds:.2f} s/s" if before else _time(latencies.seconds)
            quantiles = [_time(latencies.quantile(share)) for share in (0.5, 0.9, 0.99)]
            about = Text(STAGES.get(name, ""), style="dim")
            table.add_row(name, rate, *quantiles, busy, about)
        parts += [Text(), table]
    flows = _table("BYTES", "RATE" if before else "COUNT")
    for name, value in spent["bytes"].items():
        size = f"{format_size(int(value / seconds))}/s" if before else format_size(value)
        flows.add_row(name, size)
    return Group(*parts, Text(), flows)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def _time(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


# ---------------------------------------------------------------- a file


def use_view(answer: Answer) -> RenderableType:
    """`modelfs stats PATH`."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("path", plain(str(answer["path"])))
    facts.add_row("version", f"{answer['version']} ({format_size(answer['size'])})")
    reads, streams = answer["read_requests"], answer["stream_requests"]
    facts.add_row("opened", f"{answer['opens']:,} times")
    facts.add_row(
        "read",
        f"{format_size(answer['read_bytes'])} in {reads:,} requests of the kernel"
        + (f", {streams * 100 // reads} % of them in a stream" if reads else ""),
    )
    facts.add_row("pushed", f"{format_size(answer['pushed_bytes'])} before the kernel asked")
    facts.add_row(
        "fetched",
        f"{format_size(answer['local_bytes'])} from this disk, "
        f"{format_size(answer['remote_bytes'])} from peers"
        + (f"; {answer['amplification']:.2f} bytes for each that the kernel got" if reads else ""),
    )
    facts.add_row("from memory", format_size(answer["memory_bytes"]))
    facts.add_row(
        "written", f"{format_size(answer['write_bytes'])} in {answer['write_requests']:,} requests"
    )
    for view in answer["views"]:
        text = f"version {view['version']}" + ("" if view["current"] else ", superseded")
        text += f": {view['handles']} handles open, {view['writers']} of them for writing"
        facts.add_row("now", text + (", with uncommitted writes" if view["uncommitted"] else ""))
    return facts


def run_live(ask: Callable[[], Answer], console: Console, as_json: bool) -> None:
    """`modelfs stats --live`: ends with Ctrl-C, which is no error."""
    with suppress(KeyboardInterrupt):
        if as_json:
            watch(ask, lambda now, old: print(json.dumps(difference(now, old)), flush=True))
        if not console.is_terminal:
            watch(ask, lambda now, old: console.print(node_view(now, old)))
        with Live(console=console, auto_refresh=False, screen=True) as live:
            watch(ask, lambda now, old: live.update(node_view(now, old), refresh=True))


# ---------------------------------------------------------------- the command


def stats(
    path: Annotated[
        str | None, typer.Argument(help="A file in a modelfs mount: how this node has used it.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Every second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The node with this state directory.")
    ] = None,
    mount: Annotated[
        str | None, typer.Option(metavar="MOUNTPOINT", help="The node of this mount.")
    ] = None,
) -> None:
    """How fast this machine's node is, stage by stage; or how it has used one file."""
    if path is not None:
        if live or state_dir or mount:
            raise UserError("a PATH says which node is meant, and goes without --live")
        answer = ask_about(path, "use")
    else:
        control = choose_daemon(Registry(), state_dir, mount)
        if live:
            ask = partial(call, control, "measures", ANSWER_SECONDS)
            run_live(ask, show.console(), as_json)
            return
        answer = call(control, "measures", ANSWER_SECONDS)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        view = node_view(answer) if path is None else use_view(answer)
        show.console().print(view)
