-- The local index: history and bookkeeping of one node, rebuildable (but for the pins), never needed by a read.
-- This is the newest version; what an older one lacks is added by the migrations in index.py.
-- Paths are BLOBs relative to the source (names need not be UTF-8). Times are nanoseconds since the epoch.

CREATE TABLE IF NOT EXISTS models (
    model          BLOB PRIMARY KEY,            -- path of the model, such as models/llama-7b
    opens          INTEGER NOT NULL DEFAULT 0,  -- files opened for reading
    loads          INTEGER NOT NULL DEFAULT 0,  -- runs of opens with an idle gap between them
    hits           INTEGER NOT NULL DEFAULT 0,  -- loads served from the node tier alone (so far)
    bytes_read     INTEGER NOT NULL DEFAULT 0,  -- bytes served by the daemon itself
    first_access   INTEGER NOT NULL,
    last_access    INTEGER NOT NULL,
    heat           REAL NOT NULL DEFAULT 0,     -- loads, decayed to heat_at
    heat_at        INTEGER NOT NULL DEFAULT 0   -- when a load last added to heat
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS pins (               -- models to keep on the node
    model          BLOB PRIMARY KEY,
    at             INTEGER NOT NULL             -- since when
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS files (
    path           BLOB PRIMARY KEY,
    model          BLOB,                        -- NULL: belongs to no model
    opens          INTEGER NOT NULL DEFAULT 0,
    bytes_read     INTEGER NOT NULL DEFAULT 0,
    last_access    INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS files_by_age ON files (last_access);

CREATE TABLE IF NOT EXISTS opens (              -- the latest opens, one row each, pruned by count
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    at             INTEGER NOT NULL,
    path           BLOB NOT NULL,
    model          BLOB,
    uid            INTEGER NOT NULL,
    pod            TEXT                         -- UID of the pod, NULL where not visible
);

CREATE INDEX IF NOT EXISTS opens_by_model ON opens (model, id);

-- What the controller has yet to be told, and by whom; see outbox.py. Empty where nothing is published.

CREATE TABLE IF NOT EXISTS unsent (             -- sums since the latest batch, one row a model, in order of first access
    id             INTEGER PRIMARY KEY,
    model          BLOB NOT NULL UNIQUE,
    opens          INTEGER NOT NULL,
    loads          INTEGER NOT NULL,
    hits           INTEGER NOT NULL,            -- below 0: takes back what an earlier batch said
    bytes_read     INTEGER NOT NULL,
    last_access    INTEGER NOT NULL
);

CREATE TABLE IF NOT EXISTS unacknowledged (     -- batches that are sent until the controller says that it has them
    sequence       INTEGER PRIMARY KEY,
    accesses       BLOB NOT NULL                -- as statistics.encode_accesses makes them
);

CREATE TABLE IF NOT EXISTS unsent_outputs (     -- what happened to outputs since the latest batch; times are 0 if nothing
    id             INTEGER PRIMARY KEY,
    path           BLOB NOT NULL UNIQUE,        -- relative to the outputs root
    opens          INTEGER NOT NULL,
    last_access    INTEGER NOT NULL,
    written        INTEGER NOT NULL,            -- closed after something was written, or renamed to there
    removed        INTEGER NOT NULL,            -- its name was removed
    ended          INTEGER NOT NULL DEFAULT 0   -- version of the object that nothing stands for since; 0: none
);

CREATE TABLE IF NOT EXISTS unacknowledged_outputs ( -- of the batch with that number
    sequence       INTEGER PRIMARY KEY,
    outputs        BLOB NOT NULL                -- as statistics.encode_outputs makes them
);

CREATE TABLE IF NOT EXISTS publisher (          -- one row
    id             INTEGER PRIMARY KEY CHECK (id = 1),
    boot           TEXT NOT NULL,               -- UUID of this index: a new one begins to count anew
    sequence       INTEGER NOT NULL             -- of the latest batch
);
