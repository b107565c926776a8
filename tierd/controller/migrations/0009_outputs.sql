-- What recording, backup and scans of generated outputs need to know.

ALTER TABLE generated_outputs
    ADD COLUMN version       int         NOT NULL DEFAULT 0 CHECK (version >= 0),  -- of the object; 0: never had one
    ADD COLUMN sha256        bytea       CHECK (octet_length(sha256) = 32),        -- of the object that was compared
    ADD COLUMN inode         bigint,                -- of the file that the object is made of, with its size and times:
    ADD COLUMN mtime_ns      bigint,                -- is it still that one? An inode above 2^63 shows as negative.
    ADD COLUMN ctime_ns      bigint,
    ADD COLUMN news          bigint      NOT NULL DEFAULT 0,                       -- times that somebody told of it
    ADD COLUMN pending_since timestamptz DEFAULT now(), -- since when somebody must look at the file; NULL: nobody must
    ADD COLUMN attempts      int         NOT NULL DEFAULT 0 CHECK (attempts >= 0), -- of looking, that failed in a row
    ADD COLUMN try_at        timestamptz NOT NULL DEFAULT now(),                   -- not before
    ADD COLUMN error         text,                  -- of the last attempt
    ADD COLUMN hot_since     timestamptz,           -- when it was last brought back; NULL: it never was
    ADD COLUMN removed_at    timestamptz,           -- when a node last saw its name removed
    ADD COLUMN vanished_at   timestamptz,           -- since when nothing of it is in the source; NULL: it is there
    -- A flag alone makes nothing cold.
    ADD CONSTRAINT generated_outputs_cold_has_copy
        CHECK (NOT cold_storage OR (version > 0 AND sha256 IS NOT NULL AND size_bytes IS NOT NULL));
-- filename is the path below the user's directory: YYYY/MM/DD/UUID.EXTENSION.
CREATE UNIQUE INDEX generated_outputs_by_path ON generated_outputs (user_id, filename COLLATE "C");
CREATE INDEX generated_outputs_pending ON generated_outputs (try_at) WHERE pending_since IS NOT NULL;

CREATE TABLE output_faults (                        -- what lies below the outputs root and is left alone
    path       bytea       PRIMARY KEY,             -- relative to the outputs root; names need not be UTF-8
    directory  bytea       NOT NULL,                -- in which it lies
    reason     text        NOT NULL,                -- for people
    seen_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX output_faults_by_directory ON output_faults (directory);

CREATE TABLE output_days (                          -- directories that need not be read again while they do not change
    directory  bytea       PRIMARY KEY,             -- relative to the outputs root: USER/YYYY/MM/DD
    inode      bigint      NOT NULL,
    mtime_ns   bigint      NOT NULL,
    faults     int         NOT NULL,                -- all of them; output_faults names some
    seen_at    timestamptz NOT NULL DEFAULT now()
);

ALTER TABLE move_files
    ADD COLUMN version int CHECK (version > 0);     -- of its object; NULL: that of the move
