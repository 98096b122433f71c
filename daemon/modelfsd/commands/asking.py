"""Which daemon of this machine a command means, and asking it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from modelfs.errors import UserError
from modelfsd.commands import show
from modelfsd.commands.control import call
from modelfsd.commands.registry import Entry, Registry

ANSWER_SECONDS = 20.0


def choose_daemon(registry: Registry, state_dir: str | None, mountpoint: str | None) -> Path:
    """The admin socket of the daemon that is meant. Raises `UserError` that says what to type."""
    if state_dir and mountpoint:
        raise UserError("--state-dir and --mount both name a node: give one of them")
    if mountpoint:
        found = registry.find_by_path(mountpoint)
        if found is None:
            raise UserError(
                f"no modelfs daemon serves {mountpoint}{_mounted_here(registry.live())}"
            )
        return Path(found[0].control)
    state_dir = state_dir or os.environ.get("MODELFS_STATE_DIR")
    if state_dir:
        return Path(state_dir).absolute() / "control.sock"
    live = registry.live()
    if not live:
        raise UserError(
            "no modelfs daemon of this user runs on this machine: start one with "
            "modelfs mount MOUNTPOINT (or name its directory with --state-dir)"
        )
    if len(live) > 1:
        raise UserError(
            f"several modelfs daemons run here:\n{show.daemons_text(live)}\n"
            f"say which, for example: modelfs status --mount {live[0].mountpoint}"
        )
    return Path(live[0].control)


def _mounted_here(live: list[Entry]) -> str:
    return f"; mounted here:\n{show.daemons_text(live)}" if live else ""


def ask_about(path: str, command: str, **arguments: object) -> dict[str, Any]:
    """Ask the daemon whose mount holds a path."""
    registry = Registry()
    found = registry.find_by_path(path)
    if found is None:
        raise UserError(f"{path} is not in a modelfs mount{_mounted_here(registry.live())}")
    entry, names = found
    return call(entry.control, command, ANSWER_SECONDS, path=names, **arguments)
