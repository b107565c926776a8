"""Jobs: which there are, when each is due, one run of one over all controllers. Knows no model, output or context."""
