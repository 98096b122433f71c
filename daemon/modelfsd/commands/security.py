"""Commands about who belongs to the cluster: `token`, `node remove`, `ca rotate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from modelfsd.commands.asking import choose_daemon
from modelfsd.commands.control import call
from modelfsd.commands.registry import Registry
from modelfsd.printing import plain

ANSWER_SECONDS = 20.0
REMOVE_SECONDS = 60.0
ROTATE_SECONDS = 1000.0  # three steps, each with a restart of etcd on one node after the other

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


node_app = typer.Typer(no_args_is_help=True, help="The cluster's nodes.")
ca_app = typer.Typer(no_args_is_help=True, help="The cluster's authority.")


@node_app.command("remove")
def node_remove(
    name: Annotated[str, typer.Argument(help="The node's name or id.")],
    state_dir: StateDir = None,
    mount: Mount = None,
) -> None:
    """Shut a node out for good: its certificates are refused from now on, by all others."""
    control = choose_daemon(Registry(), state_dir, mount)
    answer = call(control, "remove", REMOVE_SECONDS, name=name)
    removed = plain(f"{answer['name']} ({answer['node']})")
    print(
        f"removed {removed}: its chunks get new copies, and etcd "
        "restarts on one node after the other.\nIf others have had access to its disk, replace the "
        "authority too: modelfs ca rotate"
    )


@ca_app.command("rotate")
def ca_rotate(
    force: Annotated[bool, typer.Option("--force", help="Also while nodes are down.")] = False,
    state_dir: StateDir = None,
    mount: Mount = None,
) -> None:
    """Replace the authority that signs all certificates, while the cluster runs."""
    control = choose_daemon(Registry(), state_dir, mount)
    answer = call(control, "rotate", ROTATE_SECONDS, force=force)
    print(
        f"the authority was replaced on {answer['nodes']} nodes; its SHA-256 is "
        f"{answer['fingerprint']}.\nJoin tokens that were made before are of no more use."
    )


def add_commands(app: typer.Typer) -> None:
    """Make them part of the `modelfs` command."""
    app.command()(token)
    app.add_typer(node_app, name="node")
    app.add_typer(ca_app, name="ca")
