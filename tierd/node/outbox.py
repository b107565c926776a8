"""The outbox: accesses that the controller has yet to acknowledge, in the index. Sends nothing: `publish.py` does.

Accesses add up per model and output (`unsent`, `unsent_outputs`, written by `Index.apply`) until `freeze` makes a
numbered batch of them, which then never changes. Batches are kept until they are acknowledged; while BATCHES_MAX of
them wait, accesses go on adding up: nothing is dropped, and nothing grows beyond one row for each model, nor beyond
the bound that the index has for outputs.

Contract: blocking, any thread, one publisher at a time. Every method may raise sqlite3.Error, and has then changed
nothing. A batch is on the disk before anybody can have seen its number, or a number could come to mean two batches.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Final, NamedTuple
from uuid import UUID, uuid4

import structlog

from tierd.node.index import Index
from tierd.statistics import (
    MODELS_MAX,
    OUTPUTS_MAX,
    ModelAccess,
    NumberedBatch,
    OutputNews,
    decode_accesses,
    decode_outputs,
    encode_accesses,
    encode_outputs,
    model_id_of,
)
from tierd.units import display

log = structlog.get_logger(__name__)

BATCHES_MAX: Final = 32


class _Publisher(NamedTuple):
    boot: UUID
    sequence: int


class Outbox:
    """See the module. `begin` comes first. `dropped` counts models left out since the start, as no catalogue can name
    them: they are never demoted either."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._publisher: _Publisher | None = None
        self.dropped = 0

    @property
    def outputs_dropped(self) -> int:
        """Outputs for which there was no room since the start."""
        return self._index.outputs_not_noted

    @property
    def begun(self) -> bool:
        """`begin` has succeeded."""
        return self._publisher is not None

    @property
    def boot(self) -> UUID:
        """Which index this is: sequences count within it."""
        return self._begun().boot

    @property
    def sequence(self) -> int:
        """Of the latest batch, 0 before the first."""
        return self._begun().sequence

    def _begun(self) -> _Publisher:
        if self._publisher is None:
            raise RuntimeError("the outbox was not begun")
        return self._publisher

    def begin(self) -> None:
        """Find out who we are, and put every model's last access into the outbox again.

        The first time with all that was ever counted; later in case it was switched off for a while, or the
        controller's database is not what it was.
        """
        with self._index.transaction(durable=True) as db:
            known = db.execute("SELECT boot, sequence FROM publisher").fetchone()
            if known is None:
                publisher = _Publisher(uuid4(), 0)
                db.execute("INSERT INTO publisher VALUES (1, ?, 0)", (str(publisher.boot),))
                db.execute(
                    "INSERT OR REPLACE INTO unsent (model, opens, loads, hits, bytes_read, last_access)"
                    " SELECT model, opens, loads, hits, bytes_read, last_access FROM models ORDER BY last_access"
                )
            else:
                publisher = _Publisher(UUID(known[0]), known[1])
                db.execute(
                    "INSERT INTO unsent (model, opens, loads, hits, bytes_read, last_access)"
                    " SELECT model, 0, 0, 0, 0, last_access FROM models WHERE true ORDER BY last_access"
                    " ON CONFLICT (model) DO UPDATE SET last_access = max(last_access, excluded.last_access)"
                )
        self._publisher = publisher

    def unsent(self) -> list[bytes]:
        """The models whose accesses the next batch can hold, those first that wait longest; none if there is no room
        for a batch."""
        with self._index.reader() as db:
            (waiting,) = db.execute("SELECT count(*) FROM unacknowledged").fetchone()
            if waiting >= BATCHES_MAX:
                return []
            return [model for (model,) in db.execute("SELECT model FROM unsent ORDER BY id LIMIT ?", (MODELS_MAX,))]

    def freeze(self, sizes: Mapping[bytes, int | None]) -> None:
        """Make the accesses of these models, and of outputs if there is room, a batch. `sizes` are the models' bytes,
        None where they are not known."""
        publisher = self._begun()
        if not sizes and not self._has_outputs():
            return
        with self._index.transaction(durable=True) as db:
            outputs = self._take_outputs(db)
            accesses = [access for model, size in sizes.items() if (access := self._take(db, model, size)) is not None]
            if accesses or outputs:
                publisher = publisher._replace(sequence=publisher.sequence + 1)
                db.execute("UPDATE publisher SET sequence = ?", (publisher.sequence,))
                db.execute("INSERT INTO unacknowledged VALUES (?, ?)", (publisher.sequence, encode_accesses(accesses)))
            if outputs:
                values = publisher.sequence, encode_outputs(outputs)
                db.execute("INSERT INTO unacknowledged_outputs VALUES (?, ?)", values)
        self._publisher = publisher

    def _has_outputs(self) -> bool:
        with self._index.reader() as db:
            return db.execute("SELECT 1 FROM unsent_outputs LIMIT 1").fetchone() is not None

    def _take_outputs(self, db: sqlite3.Connection) -> list[OutputNews]:
        """Those that wait longest; none while there is no room for a batch."""
        (waiting,) = db.execute("SELECT count(*) FROM unacknowledged").fetchone()
        if waiting >= BATCHES_MAX:
            return []
        rows = db.execute(
            "DELETE FROM unsent_outputs WHERE id IN (SELECT id FROM unsent_outputs ORDER BY id LIMIT ?)"
            " RETURNING path, opens, last_access, written, removed, ended",
            (OUTPUTS_MAX,),
        ).fetchall()
        return [
            OutputNews(
                path=path.decode(),  # the recorder took it for an output's
                opens=opens,
                last_access_ns=max(0, last_access) or None,
                written_ns=max(0, written) or None,
                removed_ns=max(0, removed) or None,
                ended=ended or None,
            )
            for path, opens, last_access, written, removed, ended in rows
        ]

    def _take(self, db: sqlite3.Connection, model: bytes, size: int | None) -> ModelAccess | None:
        columns = "opens, loads, hits, bytes_read, last_access"
        row = db.execute(f"DELETE FROM unsent WHERE model = ? RETURNING {columns}", (model,)).fetchone()
        if row is None:
            return None
        model_id = model_id_of(model)
        if model_id is None:
            self._drop(model)
            return None
        opens, loads, hits, bytes_read, last_access_ns = row
        return ModelAccess(
            model_id=model_id,
            opens=opens,
            loads=loads,
            hits=hits,
            bytes_read=bytes_read,
            last_access_ns=max(0, last_access_ns),
            size_bytes=size or None,
        )

    def _drop(self, model: bytes) -> None:
        self.dropped += 1
        if self.dropped == 1:
            log.warning("model_not_published", model=display(model), reason="no catalogue can hold its name")

    def waiting(self) -> list[NumberedBatch]:
        """The batches that are not acknowledged, the oldest first. Raises BadMessage."""
        with self._index.reader() as db:
            rows = db.execute(
                "SELECT sequence, accesses, outputs FROM unacknowledged LEFT JOIN unacknowledged_outputs"
                " USING (sequence) ORDER BY sequence"
            ).fetchall()
        return [
            NumberedBatch(
                sequence=sequence,
                models=decode_accesses(accesses),
                outputs=decode_outputs(outputs) if outputs is not None else (),
            )
            for sequence, accesses, outputs in rows
        ]

    def acknowledge(self, sequence: int) -> int:
        """Every batch up to `sequence` was applied: forget these; how many.

        An acknowledgement of what we have not sent says that this index is an older state of itself, from a backup: it
        must not give those numbers to other batches, and counts anew as another boot.
        """
        publisher = self._begun()
        with self._index.transaction(durable=True) as db:
            done = db.execute("DELETE FROM unacknowledged WHERE sequence <= ?", (sequence,)).rowcount
            db.execute("DELETE FROM unacknowledged_outputs WHERE sequence <= ?", (sequence,))
            if sequence > publisher.sequence:
                publisher = _Publisher(uuid4(), 0)
                db.execute("UPDATE publisher SET boot = ?, sequence = 0", (str(publisher.boot),))
                log.warning("index_is_an_older_state", path=str(self._index.path), consequence="it counts as a new one")
        self._publisher = publisher
        return done
