"""What `modelfs policy` asks the daemon: to show what holds for a path, and to set it."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from modelfs import changes
from modelfs.changes import Plan
from modelfs.errors import MetadataUnavailable, UserError
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, Policy
from modelfs.mirror import Mirror
from modelfs.policy import Rules, check_policy, policies_above, rules_of
from modelfsd.metadata.locating import find, names_of, path_text
from modelfsd.metadata.namespace import Namespace
from modelfsd.units import parse_duration, parse_size

INHERIT = "inherit"
FIELDS = {"replicas": "replicas", "retain": "retain_seconds", "chunk_size": "chunk_bytes"}


class Policies:
    """Answers `policy`."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace, self._mirror = namespace, namespace.mirror

    async def policy(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs policy PATH`; `set` maps fields to texts, as people type them."""
        names = names_of(request)
        is_fresh = await self._namespace.fresh()
        given = _parse(request.get("set") or {})
        ino, record = find(self._mirror, names)
        if not (record.is_directory or record.is_file):
            raise UserError(f"{path_text(names)} is neither a directory nor a file")
        if given:
            if not is_fresh:
                raise MetadataUnavailable("etcd is out of reach: nothing can be set now")
            await self._set(ino, names, given)
            ino, record = find(self._mirror, names)
        return self._show(ino, record, names)

    async def _set(self, ino: InodeNumber, names: list[bytes], given: dict[str, Any]) -> None:
        def plan(mirror: Mirror) -> Plan[Inode]:
            record = mirror.inode(ino)
            if record is None:
                raise UserError(f"{path_text(names)} has just been removed")
            fields = dict(given)
            replicas = None
            if record.is_file:
                if "chunk_bytes" in fields:
                    raise UserError(
                        "a file's chunk size is fixed when it is made: set it on the directory, "
                        "then copy the file"
                    )
                if "replicas" in fields:  # of a file they stand in its record
                    inherited = self._inherited(mirror, ino).replicas
                    replicas = fields.pop("replicas") or inherited
            policy = replace(record.policy or Policy(), **fields)
            return changes.set_policy(mirror, ino, policy if policy != Policy() else None, replicas)

        await self._namespace.change(plan, by_kernel=False)

    def _inherited(self, mirror: Mirror, ino: InodeNumber) -> Rules:
        parent = mirror.parent_of(ino)
        return rules_of(mirror, parent if parent is not None else ino, self._namespace.defaults)

    def _show(self, ino: InodeNumber, record: Inode, names: list[bytes]) -> dict[str, Any]:
        rules = rules_of(self._mirror, ino, self._namespace.defaults)
        origins = dict.fromkeys(FIELDS.values(), "default")
        for above, policy in reversed(list(policies_above(self._mirror, ino))):
            for field in FIELDS.values():
                if getattr(policy, field) is not None:
                    origins[field] = path_text([self._mirror.path_of(above)])
        answer = {
            "path": path_text(names),
            "type": "file" if record.is_file else "directory",
            "replicas": rules.replicas,
            "retain_seconds": rules.retain_seconds,
            "chunk_bytes": rules.chunk_bytes,
            "from": origins,
        }
        if record.is_file:
            answer |= {"replicas": record.replicas, "chunk_bytes": record.chunk_bytes}
            origins |= {"replicas": "the file", "chunk_bytes": "the file"}
        return answer


def _parse(given: object) -> dict[str, Any]:
    """Fields of a policy from their texts; None for those that are to be inherited."""
    if not isinstance(given, dict):
        raise UserError("the request's settings are not an object")
    fields: dict[str, Any] = {}
    for key, text in given.items():
        if key not in FIELDS or not isinstance(text, str):
            raise UserError(f"a policy has no {key!r}: it has {', '.join(FIELDS)}")
        if text == INHERIT:
            fields[FIELDS[key]] = None
        elif key == "retain":
            fields["retain_seconds"] = parse_duration(text)
        elif key == "chunk_size":
            fields["chunk_bytes"] = parse_size(text)
        elif text.isascii() and text.isdigit() and len(text) < 10:
            fields["replicas"] = int(text)
        else:
            raise UserError(f"{text!r} is not a number of replicas")
    check_policy(Policy(**fields))
    return fields
