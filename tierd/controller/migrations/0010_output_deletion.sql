-- Deletion of generated outputs everywhere, and what brings cold ones back.

ALTER TABLE generated_outputs
    ADD COLUMN stub_version int,                    -- of the object that a stub was made for; NULL: none needs any
    ADD COLUMN stub_inode   bigint,                 -- of that stub; NULL: not known
    ADD COLUMN loose        int[]       NOT NULL DEFAULT '{}',  -- versions whose stubs users moved elsewhere, perhaps
    ADD COLUMN reads_since  timestamptz,            -- the first of the recent reads; NULL: there are none
    ADD COLUMN recent_reads int         NOT NULL DEFAULT 0 CHECK (recent_reads >= 0);
UPDATE generated_outputs SET stub_version = version WHERE NOT hot_storage AND version > 0;
CREATE INDEX generated_outputs_removed ON generated_outputs (user_id, filename COLLATE "C")
    WHERE removed_at IS NOT NULL AND vanished_at IS NOT NULL;
CREATE INDEX generated_outputs_wanted ON generated_outputs (recent_reads) WHERE NOT hot_storage AND recent_reads > 0;

CREATE TABLE output_delete_wishes (                 -- who wants which outputs deleted
    id           bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      varchar(255) NOT NULL,
    output_id    uuid,                              -- NULL: all that the user has
    requested_by text         NOT NULL,             -- which process, for people
    requested_at timestamptz  NOT NULL DEFAULT now(),
    planned_at   timestamptz                        -- since when all of it is in output_erasures
);
CREATE INDEX output_delete_wishes_asked ON output_delete_wishes (id) WHERE planned_at IS NULL;

CREATE TABLE output_erasures (                      -- some outputs of one day that are deleted everywhere, step by step
    -- Random: after a restore of this database no number means what nodes confirmed before.
    id         bigint       PRIMARY KEY DEFAULT 1 + floor(random() * 9007199254740990)::bigint,
    wish_id    bigint       REFERENCES output_delete_wishes ON DELETE SET NULL,  -- NULL: removed through an overlay
    user_id    varchar(255) NOT NULL,
    date       text         NOT NULL,               -- YYYY/MM/DD; empty: what nothing else knows of the user's
    -- hidden: not in the source any more; deleted: not in the object store either
    state      text         NOT NULL DEFAULT 'planned' CHECK (state IN ('planned', 'hidden', 'deleted')),
    epoch      bigint       NOT NULL,               -- of the leader that took the last step
    asked_at   timestamptz  NOT NULL DEFAULT now(), -- what was told of the outputs before is no news
    hidden_at  timestamptz,
    deleted_at timestamptz,
    attempts   int          NOT NULL DEFAULT 0 CHECK (attempts >= 0),  -- that failed in a row
    try_at     timestamptz  NOT NULL DEFAULT now(), -- not before
    error      text                                 -- of the last attempt
);
CREATE INDEX output_erasures_by_state ON output_erasures (state, try_at);
CREATE INDEX output_erasures_by_wish ON output_erasures (wish_id);

CREATE TABLE output_tombstones (                    -- outputs that are deleted, until all that there was is known to be gone
    erasure_id bigint       NOT NULL REFERENCES output_erasures ON DELETE CASCADE,
    output_id  uuid         NOT NULL,
    user_id    varchar(255) NOT NULL,
    filename   varchar(500) NOT NULL,
    version    int          NOT NULL CHECK (version >= 0),  -- the latest that there can be an object of
    keep       int[]        NOT NULL DEFAULT '{}',  -- versions that stubs elsewhere may stand for
    inode      bigint,                              -- of the file that is deleted, with its size and times; NULL: none
    size_bytes bigint,
    mtime_ns   bigint,
    ctime_ns   bigint,
    stub_inode bigint,                              -- of the stub that is deleted; NULL: none
    gone       boolean      NOT NULL DEFAULT false, -- the object store says so
    PRIMARY KEY (erasure_id, output_id)
);
CREATE INDEX output_tombstones_by_output ON output_tombstones (output_id);

CREATE TABLE output_erasure_nodes (                 -- nodes that have nothing of it, and read nothing of it
    erasure_id   bigint       NOT NULL REFERENCES output_erasures ON DELETE CASCADE,
    node_id      varchar(255) NOT NULL,
    confirmed_at timestamptz  NOT NULL DEFAULT now(),
    PRIMARY KEY (erasure_id, node_id)
);
