"""Parts of tierd on their own: no kernel, no daemon, virtual time."""
