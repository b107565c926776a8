-- What people ask for by command: that a model be demoted, promoted, or brought back from the trash. The leader answers
-- with the move that it planned, or says why it did not.

CREATE TABLE move_wishes (
    id           bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind         text         NOT NULL CHECK (kind IN ('demote', 'promote', 'undo')),
    model_id     varchar(255) NOT NULL,
    requested_by text         NOT NULL,              -- which process, for people
    requested_at timestamptz  NOT NULL DEFAULT now(),
    state        text         NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'planned', 'refused', 'withdrawn')),
    move_id      bigint       REFERENCES moves ON DELETE SET NULL,
    answer       text         NOT NULL DEFAULT '',   -- why it was refused, and what to do
    hint         text         NOT NULL DEFAULT '',
    answered_at  timestamptz,
    CHECK ((answered_at IS NOT NULL) = (state <> 'asked'))
);
CREATE INDEX move_wishes_asked ON move_wishes (id) WHERE state = 'asked';
