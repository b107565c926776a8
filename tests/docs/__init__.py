"""Docs stay true: commands and examples of README and docs/ are run."""
