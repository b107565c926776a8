"""The jobs of generated outputs. What a scan does is told in `scan.py`."""

from __future__ import annotations

from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.outputs import restore as output_restore
from tierd.controller.outputs.restore import OutputRestores
from tierd.controller.outputs.scan import OutputScan


async def scan_outputs(context: Context) -> Outcome:
    """The job scan-outputs."""
    work = context.work
    scan = OutputScan(
        work.database,
        work.output_files,
        gone_max=work.settings.outputs_drop_max,
        tell=context.tell,
        dry_run=context.dry_run,
    )
    found = await scan.run()
    counts = found._asdict()
    del counts["problem"]
    if found.problem:
        return Outcome("failed", found.problem, counts)
    unknown = "not counted" if context.dry_run else f"{found.new} were not known"
    return Outcome("done", f"read {found.read} of {found.days} directories of outputs, {unknown}", counts)


async def restore_outputs(context: Context) -> Outcome:
    """The job restore-outputs."""
    work = context.work
    if context.dry_run:
        async with work.database.connection() as connection:
            asked = await output_restore.count_asked(connection)
        return Outcome("done", f"would carry out {asked} restores", {"asked": asked})
    restores = OutputRestores(
        *(work.database, work.epoch, work.output_files, work.store, work.output_backup.bucket, work.output_metrics)
    )
    counts = await restores.all(context.tell)
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "nothing was asked for"
    return Outcome("failed" if counts["failed"] else "done", told, counts)
