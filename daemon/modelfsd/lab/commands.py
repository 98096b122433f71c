"""The `modelfs lab` commands. Progress goes to stderr; stdout is for the result only.

`modelfsd.cli` adds `lab_app` to its commands, and turns errors into exit codes. Tests and
benchmarks use the same labs through `Lab`, which is in `lab.cluster`.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from modelfsd.lab.cluster import Lab, LabFailed, take_down

__all__ = ["Lab", "LabFailed", "lab_app", "take_down"]

lab_app = typer.Typer(help="A whole cluster on this machine.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--root", help="The lab's directory.", metavar="DIR")]
Node = Annotated[str, typer.Argument(help="A node's name, for example n2.", metavar="NODE")]


def show(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Makes a SIGTERM clean up as Ctrl-C does."""
    sys.exit(128 + number)


@lab_app.command()
def up(
    root: Root,
    nodes: Annotated[int, typer.Option(help="How many nodes.")] = 3,
    netns: Annotated[bool, typer.Option("--netns", help="Network namespaces; needs root.")] = False,
    link_mbit: Annotated[
        float | None, typer.Option(help="Rate limit of each link, Mbit/s; needs --netns.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Copies of each chunk.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the nodes as JSON.")] = False,
) -> None:
    """Start a lab, and wait until every node is mounted and sees all the others."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_on_signal)
    lab = Lab.up(root, nodes, netns=netns, link_mbit=link_mbit, replicas=replicas, show=show)
    if as_json:
        print(json.dumps(lab.describe()))
        return
    for node in lab.nodes:
        print(f"{node.name}  {node.mount}  {node.address}")
    print(f"end it with: modelfs lab down --root {lab.root}")


@lab_app.command()
def down(root: Root) -> None:
    """End a lab and remove what it has made."""
    if not take_down(root, show):
        show(f"there is no lab at {root}")


@lab_app.command()
def kill(root: Root, node: Node) -> None:
    """Kill a node's processes all at once, as a power failure does."""
    Lab.open(root, show).kill(node)


@lab_app.command()
def start(root: Root, node: Node) -> None:
    """Start a killed node again, or resume a paused one."""
    Lab.open(root, show).start(node)


@lab_app.command()
def pause(root: Root, node: Node) -> None:
    """Freeze a node's processes: it is silent, but its connections stay."""
    Lab.open(root, show).pause(node)


@lab_app.command()
def cut(root: Root, node: Node) -> None:
    """Cut a node off the network (labs with --netns)."""
    Lab.open(root, show).cut(node)


@lab_app.command()
def heal(root: Root, node: Node) -> None:
    """Connect a node again that was cut off."""
    Lab.open(root, show).heal(node)
