"""The controller: everything that changes the hot and cold tiers, and PostgreSQL. Imports nothing of `tierd.node`."""
