"""Generated outputs: found, backed up, made cold, deleted, packed anew, restored."""
