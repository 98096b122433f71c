"""Why an etcd child has ended, as far as its log says."""

from __future__ import annotations

from pathlib import Path

from modelfs.errors import UserError
from modelfsd.etcd.process import LOG_SEARCH_BYTES, EtcdProcess

# What etcd 3.4 and 3.5 log when they end for these reasons: in one line, all of the first; in a
# line of level fatal or worse, one of the second.
_REMOVED_TEXTS = ('"msg":"server error"', "permanently removed from the cluster")
_FATAL_STARTS = ('{"level":"fatal"', '{"level":"panic"', "panic: ")
_CORRUPT_TEXTS = ("crc mismatch", "WAL", "wal: ", "snapshot", "database", "panic: ")
# ... but this passes, and harms no data: it is tried again until it does.
_PASSING_TEXTS = ("no space left on device", "disk quota exceeded", "too many open files")


class MemberRemoved(UserError):
    """The cluster has removed this member; it can join again, with an empty data directory."""


class MemberCorrupt(UserError):
    """The member's data directory cannot be read."""


def exit_error(process: EtcdProcess, record_path: Path) -> UserError:
    """Why the last child ended."""
    lines = process.log_tail(LOG_SEARCH_BYTES).splitlines()
    if any(all(text in line for text in _REMOVED_TEXTS) for line in lines):
        return MemberRemoved(
            "the cluster has removed this node's etcd member. Its data directory"
            f" {process.data_directory} is of no more use: delete it and"
            f" {record_path} to join again"
        )
    text = f"etcd ended with status {process.exit_status}; {last_words(process)}"
    last_cries = [line for line in lines if line.startswith(_FATAL_STARTS)]
    is_passing = any(part in line for line in last_cries for part in _PASSING_TEXTS)
    if not is_passing and any(p in line for line in last_cries for p in _CORRUPT_TEXTS):
        return MemberCorrupt(
            f"{text}\nIf its data directory is damaged and other voters are alive, delete"
            f" {process.data_directory} and {record_path} to join again"
        )
    return UserError(text)


def last_words(process: EtcdProcess) -> str:
    """What it logged last, for people."""
    return f"the last lines of {process.log_path}:\n{process.log_tail().rstrip()}"
