"""What `-o` says: the words that it knows, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from modelfs.errors import UserError


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What `-o` says."""

    allow_other: bool
    xattr: bool = False
    read_only: bool = False
    no_exec: bool = False
    relatime: bool = False

    def fuse_options(self) -> frozenset[str]:
        """The words for libfuse. The kernel checks permissions itself, always."""
        words = {"fsname=modelfs", "subtype=modelfs", "default_permissions"}
        if self.allow_other:
            words.add("allow_other")
        if self.read_only:
            words.add("ro")
        if self.no_exec:
            words.add("noexec")
        return frozenset(words)


_OPTION_WORDS: dict[str, dict[str, bool]] = {
    "allow_other": {"allow_other": True},
    "noallow_other": {"allow_other": False},
    "xattr": {"xattr": True},
    "noxattr": {"xattr": False},
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "relatime": {"relatime": True},
    "noatime": {"relatime": False},
    "exec": {"no_exec": False},
    "noexec": {"no_exec": True},
    "default_permissions": {},  # always on
    "defaults": {},
}


def is_option(word: str) -> bool:
    """Whether `-o` knows the word."""
    return word in _OPTION_WORDS


def parse_options(words: Sequence[str], start: MountOptions) -> MountOptions:
    """`start` changed by the words of `-o`, in order. Raises `UserError` for an unknown one."""
    options = start
    for word in words:
        if word not in _OPTION_WORDS:
            known = ", ".join(sorted(_OPTION_WORDS))
            raise UserError(f"mount option {word!r} is unknown; the known ones are {known}")
        options = replace(options, **_OPTION_WORDS[word])
    return options
