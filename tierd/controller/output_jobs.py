"""The jobs of generated outputs. What a scan does is told in `output_scan.py`."""

from __future__ import annotations

from tierd.controller.jobs import Context, Outcome
from tierd.controller.output_scan import OutputScan


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
