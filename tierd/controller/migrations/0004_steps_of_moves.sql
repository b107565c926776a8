-- What a move must remember between its steps, so that whoever takes over can go on.

ALTER TABLE moves
    ADD COLUMN by_hand     boolean NOT NULL DEFAULT false,  -- somebody asked for it: age and last access do not matter
    ADD COLUMN last_access timestamptz,                     -- of the model, when the move was decided
    ADD COLUMN grace_until timestamptz,                     -- nothing is deleted before; NULL: no grace has begun
    ADD COLUMN abandoning  text;                            -- why it is being put back; NULL: it is not
CREATE INDEX moves_by_grace ON moves (grace_until) WHERE state = 'in_grace';

ALTER TABLE move_files
    ADD COLUMN ctime_ns       bigint NOT NULL DEFAULT 0,    -- as it was planned
    ADD COLUMN links          bytea  NOT NULL DEFAULT '',   -- its other names within the model, NUL between them
    ADD COLUMN stub           bigint,                       -- inode of its stub; NULL: none was made yet
    ADD COLUMN trash_ctime_ns bigint,                       -- when it was last seen to be itself in the trash
    DROP CONSTRAINT move_files_state_check,
    -- restored: it is back in its place; kept: it could not go back there, and was not deleted
    ADD CONSTRAINT move_files_state_check CHECK (state IN (
        'planned', 'copied', 'verified', 'switched', 'deleted', 'restored', 'kept'));
