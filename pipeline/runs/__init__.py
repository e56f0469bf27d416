"""Runs: the record of each, how one is stopped, and what may be freed when no run refers to it."""
