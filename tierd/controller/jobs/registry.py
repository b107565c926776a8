"""Which jobs there are, and when each runs. Another one is a line here, a name with its help, a setting of its time."""

from __future__ import annotations

from typing import Final

from tierd.controller.contexts import jobs as context_jobs
from tierd.controller.jobs.names import (
    ARCHIVE_OLD_CONTEXTS,
    CLEANUP_OLD_OUTPUTS,
    CLEANUP_UNUSED_MODELS,
    COMPRESS_OLD_OUTPUTS,
    PURGE_EXPIRED_CONTEXTS,
    RESTORE_OUTPUTS,
    SCAN_CATALOGUE,
    SCAN_OUTPUTS,
)
from tierd.controller.jobs.run import Job
from tierd.controller.models import cleanup
from tierd.controller.outputs import cleanup as output_cleanup
from tierd.controller.outputs import compress as output_compress
from tierd.controller.outputs import jobs as output_jobs

JOBS: Final = {
    job.name: job
    for job in (
        Job(CLEANUP_UNUSED_MODELS, lambda settings: settings.cleanup_at, cleanup.cleanup_unused_models),
        Job(SCAN_CATALOGUE, lambda _: None, cleanup.scan_catalogue),
        Job(CLEANUP_OLD_OUTPUTS, lambda settings: settings.outputs_cleanup_at, output_cleanup.cleanup_old_outputs),
        Job(SCAN_OUTPUTS, lambda settings: settings.outputs_scan_at, output_jobs.scan_outputs),
        Job(COMPRESS_OLD_OUTPUTS, lambda settings: settings.outputs_compress_at, output_compress.compress_old_outputs),
        Job(RESTORE_OUTPUTS, lambda _: None, output_jobs.restore_outputs),
        Job(ARCHIVE_OLD_CONTEXTS, lambda settings: settings.archive_at, context_jobs.archive_contexts),
        Job(PURGE_EXPIRED_CONTEXTS, lambda settings: settings.purge_contexts_at, context_jobs.purge_contexts),
    )
}
