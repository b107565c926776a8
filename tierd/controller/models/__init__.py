"""Models: the catalogue, what leaves the hot tier and why, objects that may be adopted. Moves nothing itself."""
