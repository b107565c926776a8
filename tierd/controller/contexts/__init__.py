"""Chat contexts: recent ones to the archive, that to the object store. `tierd.contexts` is the library."""
