-- What moving models between the tiers needs: the wish for a move before its first step, every step on the way, what
-- happened, and who may take steps.

ALTER TABLE model_locations
    ADD COLUMN version       int         NOT NULL DEFAULT 0 CHECK (version >= 0),  -- of its cold copy; 0: never had one
    ADD COLUMN files         int         CHECK (files >= 0),                       -- NULL: not counted yet
    ADD COLUMN hits          bigint      NOT NULL DEFAULT 0 CHECK (hits >= 0),     -- loads from node tiers alone
    ADD COLUMN pinned        boolean     NOT NULL DEFAULT false,                   -- never demoted
    ADD COLUMN registered_at timestamptz NOT NULL DEFAULT now(),                   -- when the controller first saw it
    -- A flag alone makes nothing cold.
    ADD CONSTRAINT model_locations_cold_has_copy CHECK (tier <> 'cold' OR version > 0);

CREATE TABLE moves (                                -- transitions, from the wish to the end; each is one model's
    id          bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind        text         NOT NULL CHECK (kind IN ('demote', 'promote', 'delete', 'import', 'undo')),
    subject     varchar(255) NOT NULL,              -- model_id
    state       text         NOT NULL DEFAULT 'planned' CHECK (state IN (
                    'planned', 'copying', 'verifying', 'switching', 'in_grace', 'deleting',
                    'done', 'abandoned', 'failed')),
    version     int          NOT NULL DEFAULT 0 CHECK (version >= 0),  -- of the cold copy that is written or read
    epoch       bigint,                             -- of the leader that took the last step; NULL: none did yet
    attempts    int          NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    size_bytes  bigint       CHECK (size_bytes >= 0),  -- NULL: not counted yet
    done_bytes  bigint       NOT NULL DEFAULT 0 CHECK (done_bytes >= 0),
    error       text,                               -- of the last attempt that failed
    reason      text         NOT NULL DEFAULT '',   -- why it was decided, for people
    detail      jsonb        NOT NULL DEFAULT '{}',
    created_at  timestamptz  NOT NULL DEFAULT now(),
    updated_at  timestamptz  NOT NULL DEFAULT now(),
    finished_at timestamptz,
    CHECK ((finished_at IS NOT NULL) = (state IN ('done', 'abandoned', 'failed')))
);
-- Two moves of one model would undo each other: an undo first abandons the demotion, in the same transaction.
CREATE UNIQUE INDEX moves_one_unfinished ON moves (subject) WHERE finished_at IS NULL;
CREATE INDEX moves_oldest_unfinished ON moves (created_at) WHERE finished_at IS NULL;
CREATE INDEX moves_by_subject ON moves (subject, id);

CREATE TABLE move_files (                           -- each file of a move: what was copied is what it was then
    move_id     bigint NOT NULL REFERENCES moves ON DELETE CASCADE,
    path        bytea  NOT NULL,                    -- relative to the model; names need not be UTF-8
    size_bytes  bigint NOT NULL CHECK (size_bytes >= 0),
    mtime_ns    bigint NOT NULL,                    -- size, mtime and inode: is it still the file that was copied?
    inode       bigint NOT NULL,                    -- 64 bits; one above 2^63 shows as negative
    mode        int    NOT NULL,
    sha256      bytea  CHECK (octet_length(sha256) = 32),
    state       text   NOT NULL DEFAULT 'planned' CHECK (state IN (
                    'planned', 'copied', 'verified', 'switched', 'deleted')),
    PRIMARY KEY (move_id, path),
    CHECK (state = 'planned' OR sha256 IS NOT NULL)
);

CREATE TABLE move_events (                          -- what was done and why; the latest, purged by count (events.py)
    id          bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz  NOT NULL DEFAULT now(),
    move_id     bigint       REFERENCES moves ON DELETE SET NULL,  -- NULL: of no move, such as a refusal to begin one
    subject     varchar(255) NOT NULL,
    event       text         NOT NULL,
    reason      text         NOT NULL DEFAULT '',
    detail      jsonb        NOT NULL DEFAULT '{}'
);
CREATE INDEX move_events_by_subject ON move_events (subject, id);
CREATE INDEX move_events_by_move ON move_events (move_id);

CREATE TABLE leader (                               -- one row: whose epoch it is (leader.py)
    one         boolean     PRIMARY KEY DEFAULT true CHECK (one),
    epoch       bigint      NOT NULL CHECK (epoch >= 0),
    holder      text        NOT NULL,               -- which process, for people
    backend_pid int         NOT NULL,               -- the session that holds the advisory lock
    since       timestamptz NOT NULL DEFAULT now()
);
INSERT INTO leader (epoch, holder, backend_pid) VALUES (0, '', 0);
