"""Which jobs there are, and when each runs. Another one is a line here, a name with its help, a setting of its time."""

from __future__ import annotations

from typing import Final

from tierd.controller import cleanup, output_cleanup, output_jobs
from tierd.controller.job_names import CLEANUP_OLD_OUTPUTS, CLEANUP_UNUSED_MODELS, SCAN_CATALOGUE, SCAN_OUTPUTS
from tierd.controller.jobs import Job

JOBS: Final = {
    job.name: job
    for job in (
        Job(CLEANUP_UNUSED_MODELS, lambda settings: settings.cleanup_at, cleanup.cleanup_unused_models),
        Job(SCAN_CATALOGUE, lambda _: None, cleanup.scan_catalogue),
        Job(CLEANUP_OLD_OUTPUTS, lambda settings: settings.outputs_cleanup_at, output_cleanup.cleanup_old_outputs),
        Job(SCAN_OUTPUTS, lambda settings: settings.outputs_scan_at, output_jobs.scan_outputs),
    )
}
