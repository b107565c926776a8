"""The hot tier as the controller reaches it: files, stubs and their directories. Blocking; knows no database."""
