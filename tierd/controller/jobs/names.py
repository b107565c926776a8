"""The jobs by name, for whoever only names them: the command line imports nothing of what they need."""

from __future__ import annotations

from typing import Final

CLEANUP_UNUSED_MODELS: Final = "cleanup-unused-models"
SCAN_CATALOGUE: Final = "scan-catalogue"
CLEANUP_OLD_OUTPUTS: Final = "cleanup-old-outputs"
SCAN_OUTPUTS: Final = "scan-outputs"
COMPRESS_OLD_OUTPUTS: Final = "compress-old-outputs"
RESTORE_OUTPUTS: Final = "restore-outputs"
ARCHIVE_OLD_CONTEXTS: Final = "archive-old-contexts"
PURGE_EXPIRED_CONTEXTS: Final = "purge-expired-contexts"

JOB_HELP: Final = {
    CLEANUP_UNUSED_MODELS: "Demote models that nobody has read for long, or for which hot storage has no room.",
    SCAN_CATALOGUE: "Bring the catalogue up to date with the models roots of the source.",
    CLEANUP_OLD_OUTPUTS: "Demote outputs that are old, or for which hot storage has no room.",
    SCAN_OUTPUTS: "Find generated outputs that no node told of, so that they are backed up.",
    COMPRESS_OLD_OUTPUTS: "Pack old cold PNG images anew without loss, where outputs_compress_after_days says so.",
    RESTORE_OUTPUTS: "Carry out what `tierd outputs restore` asked for and nobody has done yet.",
    ARCHIVE_OLD_CONTEXTS: "Move chat contexts that nobody has written to for long into the archive.",
    PURGE_EXPIRED_CONTEXTS: "Export months of the archive that are over, and drop them later.",
}
"""Each job, and what it does in one line."""
