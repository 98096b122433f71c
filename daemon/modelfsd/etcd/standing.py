"""What this node's etcd member is to the cluster, kept in `etcd.json` in the state directory.

It only ever says less than is true: MEMBER is written when the cluster counts us as a voter.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path

from modelfs.errors import UserError


class Standing(Enum):
    """What this node's member is, as far as we know for sure."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"  # founding or joining was begun: do it again
    MEMBER = "member"


class StandingRecord:
    """The file."""

    def __init__(self, state_directory: Path) -> None:
        self.path = state_directory / "etcd.json"

    @property
    def standing(self) -> Standing:
        """ABSENT → found or join; UNFINISHED → the same; MEMBER → resume."""
        return Standing(self._load()["standing"]) if self.path.exists() else Standing.ABSENT

    @property
    def member_id(self) -> int | None:
        """The id that the cluster gave us when an attempt was begun."""
        member_id = self._load().get("member_id")
        return member_id if isinstance(member_id, int) else None

    def write(self, standing: Standing, member_id: int = 0) -> None:
        """Write it, so that it survives a crash."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as record_file:
            json.dump({"standing": standing.value, "member_id": member_id}, record_file)
            record_file.flush()
            os.fsync(record_file.fileno())
        temporary.rename(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _load(self) -> dict[str, str | int]:
        try:
            record = json.loads(self.path.read_text())
            Standing(record["standing"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: {error}") from error
        assert isinstance(record, dict)
        return record
