-- Old images that are packed anew, and what people ask to have back in the hot tier.

ALTER TABLE generated_outputs
    ADD COLUMN reserved int NOT NULL DEFAULT 0 CHECK (reserved >= 0);  -- versions up to this are, or were, somebody's

CREATE TABLE output_compressions (                   -- which object took the place of which one
    id          bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    output_id   uuid         NOT NULL,               -- no reference: objects outlive their output for a moment
    user_id     varchar(255) NOT NULL,
    filename    varchar(500) NOT NULL,               -- with user_id: what its objects are called
    old_version int          NOT NULL CHECK (old_version > 0),
    old_size    bigint       NOT NULL,
    old_sha256  bytea        NOT NULL CHECK (octet_length(old_sha256) = 32),
    version     int          NOT NULL CHECK (version > old_version),   -- of the new object
    size_bytes  bigint       CHECK (size_bytes < old_size),            -- NULL until it was stored and compared
    sha256      bytea        CHECK (octet_length(sha256) = 32),
    old_stub    bigint,                              -- inode of the stub that stood for the original; NULL: not known
    state       text         NOT NULL DEFAULT 'making' CHECK (state IN (
                    'making',                        -- nobody refers to the new object
                    'switching',                     -- a stub may stand for it
                    'in_grace',                      -- the stub and the row say it; the original can take its place
                    'deleting',                      -- nothing refers to the original any more
                    'done', 'left', 'kept')),        -- left: nothing to win; kept: both objects stay
    reason      text         NOT NULL DEFAULT '',    -- of the end, or why it does not go on; for people
    try_at      timestamptz  NOT NULL DEFAULT now(), -- not before; in the grace: its end
    created_at  timestamptz  NOT NULL DEFAULT now(),
    finished_at timestamptz,
    CHECK ((finished_at IS NOT NULL) = (state IN ('done', 'left', 'kept'))),
    CHECK (state NOT IN ('switching', 'in_grace', 'deleting', 'done') OR (size_bytes IS NOT NULL AND sha256 IS NOT NULL))
);
CREATE UNIQUE INDEX output_compressions_one ON output_compressions (output_id) WHERE finished_at IS NULL;
CREATE INDEX output_compressions_of ON output_compressions (output_id, version);
CREATE INDEX output_compressions_unfinished ON output_compressions (id) WHERE finished_at IS NULL;

CREATE TABLE output_restores (                       -- what people ask for; the latest are kept
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    output_ids   uuid[],                             -- NULL: any
    user_id      varchar(255),                       -- NULL: any
    first_day    text,                               -- YYYY/MM/DD, as in the path; NULL: any
    last_day     text,
    damaged      boolean     NOT NULL,               -- files that are there are read, too
    dry_run      boolean     NOT NULL,
    requested_by text        NOT NULL,               -- for people
    requested_at timestamptz NOT NULL DEFAULT now(),
    counts       jsonb,                              -- NULL: nobody has carried it out yet
    left_alone   jsonb       NOT NULL DEFAULT '[]',
    finished_at  timestamptz,
    CHECK (output_ids IS NOT NULL OR user_id IS NOT NULL OR first_day IS NOT NULL OR last_day IS NOT NULL),
    CHECK ((finished_at IS NULL) = (counts IS NULL))
);
CREATE INDEX output_restores_asked ON output_restores (id) WHERE finished_at IS NULL;
