"""What nodes report, folded into the database."""
