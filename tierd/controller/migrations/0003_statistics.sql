-- What nodes report through Redis: that they live, which models they hold open, how often models were read.

CREATE TABLE nodes (
    node_id     varchar(255) PRIMARY KEY,
    boot        uuid         NOT NULL,              -- of the node's index: a new index counts from the start
    first_seen  timestamptz  NOT NULL DEFAULT now(),
    last_seen   timestamptz  NOT NULL DEFAULT now(),
    leases_at   timestamptz,                        -- when it last said what it holds open; NULL: never
    version     text         NOT NULL DEFAULT '',   -- of tierd there
    registered  boolean      NOT NULL DEFAULT true  -- false: gone for good, nothing is deleted for want of its report
);

CREATE TABLE node_leases (                          -- models with an open file, as of nodes.leases_at
    node_id     varchar(255) NOT NULL REFERENCES nodes ON DELETE CASCADE,
    model_id    varchar(255) NOT NULL,              -- not a reference: a node may read what nobody has registered
    PRIMARY KEY (node_id, model_id)
);
CREATE INDEX node_leases_by_model ON node_leases (model_id);

CREATE TABLE statistics_applied (                   -- up to which batch each node's statistics have been counted
    node_id     varchar(255) NOT NULL,              -- not a reference: old batches of a node that was removed count once
    boot        uuid         NOT NULL,
    sequence    bigint       NOT NULL CHECK (sequence >= 0),
    PRIMARY KEY (node_id, boot)
);
