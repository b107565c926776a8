-- What the controller runs by schedule or on request, and what that needs to know of models.

CREATE TABLE job_runs (                             -- the latest; purged by count (job_runs.py)
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job          text        NOT NULL,
    dry_run      boolean     NOT NULL DEFAULT false, -- tells what it would do
    due_at       timestamptz,                       -- the time of the schedule; NULL: somebody asked for it
    state        text        NOT NULL CHECK (state IN (
                     'requested', 'running', 'done', 'failed', 'refused', 'interrupted', 'withdrawn')),
    requested_by text        NOT NULL,              -- for people
    requested_at timestamptz NOT NULL DEFAULT now(),
    started_at   timestamptz,
    finished_at  timestamptz,
    epoch        bigint,                            -- of the leader that runs it or ran it
    progress     text        NOT NULL DEFAULT '',   -- what it is at, for people
    result       text        NOT NULL DEFAULT '',   -- one line, for people
    counts       jsonb       NOT NULL DEFAULT '{}',
    CHECK ((finished_at IS NOT NULL) = (state IN ('done', 'failed', 'refused', 'interrupted', 'withdrawn'))),
    CHECK ((epoch IS NOT NULL) = (started_at IS NOT NULL))
);
-- The schedule's instants are run once, whichever controllers come and go.
CREATE UNIQUE INDEX job_runs_once_due ON job_runs (job, due_at) WHERE due_at IS NOT NULL;
-- Who asks for what somebody else has asked for waits for the same run.
CREATE UNIQUE INDEX job_runs_one_requested ON job_runs (job, dry_run) WHERE state = 'requested';
CREATE INDEX job_runs_unfinished ON job_runs (job, id) WHERE finished_at IS NULL;

ALTER TABLE model_locations
    ADD COLUMN seen_at     timestamptz,             -- when a scan of the source found it last; NULL: none did yet
    ADD COLUMN vanished_at timestamptz;             -- since when scans find nothing of it in the source; NULL: it is there

-- Which rows nobody will ask for again. A node that comes back after this is one whose index is older than any backup.
ALTER TABLE statistics_applied ADD COLUMN applied_at timestamptz NOT NULL DEFAULT now();
