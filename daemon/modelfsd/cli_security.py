"""Commands about who belongs to the cluster: `token`, `node remove`, `ca rotate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from modelfsd.asking import choose_daemon
from modelfsd.control import call
from modelfsd.registry import Registry

ANSWER_SECONDS = 20.0

StateDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="The node with this state directory.")
]
Mount = Annotated[
    str | None, typer.Option("--mount", metavar="MOUNTPOINT", help="The node of this mount.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def token(
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it lasts.")] = "1h",
    uses: Annotated[int, typer.Option(metavar="N", help="How many nodes it lets in.")] = 1,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    mount: Mount = None,
) -> None:
    """Print a token with which a new machine can join: `modelfs mount DIR --join TOKEN`."""
    control = choose_daemon(Registry(), state_dir, mount)
    answer = call(control, "token", ANSWER_SECONDS, ttl=ttl, uses=uses)
    print(json.dumps(answer, indent=2) if as_json else answer["token"])


def add_commands(app: typer.Typer) -> None:
    """Make them part of the `modelfs` command."""
    app.command()(token)
