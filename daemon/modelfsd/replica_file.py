"""The mirror's copy on disk, so that a node can start while etcd is out of reach.

One SQLite table of etcd's keys under our prefix, and the revision that it is complete to. A batch
of the watch is one SQLite transaction, so the file is always some whole revision, and a restart
watches on from there. It is a cache: it may be behind, and losing it costs a full load.

All calls block and are made from one worker thread at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from modelfs.ids import Revision
from modelfs.ports import Event, KeyValue, WatchBatch

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
        try:
            self._open()
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._open()

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # Losing the last moments in a power cut is fine: the watch sends them again.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.executescript(_SCHEMA)
        row = self._database.execute("SELECT cluster FROM progress").fetchone()
        if row is None or row[0] != self._cluster:
            self.replace(Revision(0), ())

    def load(self) -> tuple[Revision, list[KeyValue]]:
        """The revision of the file and all its rows; (0, []) if it is new."""
        (revision,) = self._database.execute("SELECT revision FROM progress").fetchone()
        query = "SELECT key, value, create_revision, mod_revision FROM rows"
        return Revision(revision), [KeyValue(*row) for row in self._database.execute(query)]

    def replace(self, revision: Revision, rows: Iterable[KeyValue]) -> None:
        """Become exactly these rows."""
        with self._transaction() as database:
            database.execute("DELETE FROM rows")
            database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)",
                ((r.key, r.value, r.create_revision, r.mod_revision) for r in rows),
            )
            database.execute("DELETE FROM progress")
            database.execute("INSERT INTO progress VALUES (?, ?)", (self._cluster, revision))

    def extend(self, batches: Iterable[WatchBatch]) -> None:
        """Take further batches of the watch, in order."""
        with self._transaction() as database:
            for batch in batches:
                for event in batch.events:
                    self._take(database, event)
                database.execute("UPDATE progress SET revision = ?", (batch.revision,))

    @staticmethod
    def _take(database: sqlite3.Connection, event: Event) -> None:
        if event.value is None:
            database.execute("DELETE FROM rows WHERE key = ?", (event.key,))
        else:
            database.execute(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)",
                (event.key, event.value, event.create_revision, event.mod_revision),
            )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK when the body fails."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
