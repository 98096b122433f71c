"""Paths as commands send them: lists of names from the root of the mount."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelfs.errors import UserError
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode
from modelfs.limits import NAME_BYTES_MAX
from modelfs.mirror import Mirror


def names_of(request: dict[str, Any]) -> list[bytes]:
    """The names that a request gives as `path`. Raises `UserError` for what cannot be a path."""
    path = request.get("path", [])
    if not isinstance(path, list) or not all(isinstance(name, str) for name in path):
        raise UserError("the request's path is not a list of names")
    names = [name.encode(errors="surrogateescape") for name in path]
    for name in names:
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise UserError(f"{path_text([name])!r} is not a name")
        if len(name) > NAME_BYTES_MAX:
            raise UserError(f"a name has at most {NAME_BYTES_MAX} bytes")
    return names


def path_text(names: Sequence[bytes]) -> str:
    """A path for people, from the root of the mount."""
    return "/" + b"/".join(names).decode(errors="replace")


def exact_path(mirror: Mirror, parent: InodeNumber, name: bytes) -> str:
    """The path of a name from the root of the mount; bytes that are not UTF-8 as surrogates."""
    above = mirror.path_of(parent)
    return "/" + (above + b"/" + name if above else name).decode(errors="surrogateescape")


def paths_of(mirror: Mirror, ino: InodeNumber) -> list[str]:
    """All paths of an inode, as `exact_path`; one that says so if it has no name."""
    if ino == ROOT_INODE:
        return ["/"]
    names = mirror.names.get(ino, ())
    return sorted(exact_path(mirror, *name) for name in names) or [f"(inode {ino}, without a name)"]


def find(mirror: Mirror, names: Sequence[bytes]) -> tuple[InodeNumber, Inode]:
    """What a path means now. Raises `UserError` if there is no such file or directory."""
    ino = ROOT_INODE
    for depth, name in enumerate(names):
        child = mirror.child(ino, name)
        if child is None:
            raise UserError(f"no such file or directory: {path_text(names[: depth + 1])}")
        ino = child.ino
    record = mirror.inode(ino)
    if record is None:
        raise UserError(f"{path_text(names)} has just been removed")
    return ino, record
