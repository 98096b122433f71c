"""The mirror's copy on disk, so that a node can start while etcd is out of reach.

One SQLite table of etcd's keys under our prefix, and the revision that it is complete to. A batch
of the watch is one SQLite transaction, so the file is always some whole revision, and a restart
watches on from there. It is a cache: it may be behind, and losing it costs a full load. So what
goes wrong with it (a full disk) is logged, and the file stays as it was until the next start. Of
retained versions only the keys are kept, which is all that the mirror takes.

All calls block, on worker threads; a lock keeps them apart.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from modelfs import keys
from modelfs.ids import Revision
from modelfs.ports import Event, KeyValue, WatchBatch

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    key BLOB PRIMARY KEY, value BLOB NOT NULL,
    create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (
    cluster TEXT NOT NULL, revision INTEGER NOT NULL
);
"""


class ReplicaFile:
    """The rows of one cluster, as of one revision. A damaged or foreign file is started anew."""

    def __init__(self, path: Path, cluster: str) -> None:
        self._path, self._cluster = path, cluster
        self._lock = threading.Lock()
        self._is_behind = False  # a batch could not be written: later ones must not be either
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._start_anew(error)

    def _start_anew(self, error: sqlite3.DatabaseError) -> None:
        log.warning("%s is damaged (%s): starting it anew", self._path, error)
        self._database.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # Losing the last moments in a power cut is fine: the watch sends them again.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.executescript(_SCHEMA)
        row = self._database.execute("SELECT cluster FROM progress").fetchone()
        if row is None or row[0] != self._cluster:
            self._replace(Revision(0), ())

    def load(self) -> tuple[Revision, list[KeyValue]]:
        """The revision of the file and all its rows; (0, []) if it is new."""
        with self._lock:
            try:
                (found,) = self._database.execute("PRAGMA quick_check").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
                return self._load()
            except sqlite3.DatabaseError as error:
                self._start_anew(error)
                return self._load()

    def _load(self) -> tuple[Revision, list[KeyValue]]:
        query = "SELECT key, value, create_revision, mod_revision FROM rows"
        return self._revision(), [KeyValue(*row) for row in self._database.execute(query)]

    def _revision(self) -> Revision:
        (revision,) = self._database.execute("SELECT revision FROM progress").fetchone()
        return Revision(revision)

    def replace(self, revision: Revision, rows: Iterable[KeyValue]) -> None:
        """Become exactly these rows."""
        with self._lock:
            try:
                self._replace(revision, rows)
                self._is_behind = False
            except sqlite3.Error as error:
                self._fall_behind(error)

    def _fall_behind(self, error: sqlite3.Error) -> None:
        log.warning("%s cannot be written (%s): it stays as it was", self._path, error)
        self._is_behind = True

    def _replace(self, revision: Revision, rows: Iterable[KeyValue]) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM rows")
            database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)",
                ((r.key, r.value, r.create_revision, r.mod_revision) for r in rows),
            )
            database.execute("DELETE FROM progress")
            database.execute("INSERT INTO progress VALUES (?, ?)", (self._cluster, revision))

    def extend(self, batches: Iterable[WatchBatch]) -> None:
        """Take further batches of the watch, in order; what the file has already is left out."""
        with self._lock:
            if self._is_behind:
                return
            try:
                self._extend(batches)
            except sqlite3.Error as error:
                self._fall_behind(error)

    def _extend(self, batches: Iterable[WatchBatch]) -> None:
        with self._transaction() as database:
            revision = self._revision()
            for batch in batches:
                if batch.revision > revision:
                    for event in batch.events:
                        self._take(database, event)
                    database.execute("UPDATE progress SET revision = ?", (batch.revision,))

    @staticmethod
    def _take(database: sqlite3.Connection, event: Event) -> None:
        if event.value is None:
            database.execute("DELETE FROM rows WHERE key = ?", (event.key,))
        else:
            value = b"" if event.key.startswith(keys.HISTORY_PREFIX) else event.value
            database.execute(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)",
                (event.key, value, event.create_revision, event.mod_revision),
            )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK when the body fails."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._database.execute("COMMIT")
        if self._database.in_transaction:  # the body failed, or the commit, on a full disk
            self._database.execute("ROLLBACK")
