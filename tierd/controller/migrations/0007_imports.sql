-- Models whose objects somebody else put into the bucket: cold, with no copy of ours. Their objects were read once.

ALTER TABLE model_locations
    ADD COLUMN imported boolean NOT NULL DEFAULT false,
    DROP CONSTRAINT model_locations_cold_has_copy,
    ADD CONSTRAINT model_locations_cold_has_copy CHECK (tier <> 'cold' OR version > 0 OR imported);

ALTER TABLE move_wishes
    ADD COLUMN prefix text NOT NULL DEFAULT '',      -- of an import: where its objects are in the bucket
    DROP CONSTRAINT move_wishes_kind_check,
    ADD CONSTRAINT move_wishes_kind_check CHECK (kind IN ('demote', 'promote', 'undo', 'import'));
