"""Campaigns: what breaks such systems, done often. Each has a short form, which every run does, and a long one."""
