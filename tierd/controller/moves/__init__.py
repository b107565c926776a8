"""Moves between the tiers: planned, carried on step by step, undone. Nothing else changes the files of a tier."""
