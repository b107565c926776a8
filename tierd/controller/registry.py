"""Which jobs there are, and when each runs. Another one is a line here, a name with its help, a setting of its time."""

from __future__ import annotations

from typing import Final

from tierd.controller import cleanup, context_jobs
from tierd.controller.job_names import (
    ARCHIVE_OLD_CONTEXTS,
    CLEANUP_UNUSED_MODELS,
    PURGE_EXPIRED_CONTEXTS,
    SCAN_CATALOGUE,
)
from tierd.controller.jobs import Job

JOBS: Final = {
    job.name: job
    for job in (
        Job(CLEANUP_UNUSED_MODELS, lambda settings: settings.cleanup_at, cleanup.cleanup_unused_models),
        Job(SCAN_CATALOGUE, lambda _: None, cleanup.scan_catalogue),
        Job(ARCHIVE_OLD_CONTEXTS, lambda settings: settings.archive_at, context_jobs.archive_contexts),
        Job(PURGE_EXPIRED_CONTEXTS, lambda settings: settings.purge_contexts_at, context_jobs.purge_contexts),
    )
}
