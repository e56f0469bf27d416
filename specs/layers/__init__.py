"""Strategies that choose which blocks an edit replaces: one file a kind of evidence, and their union."""
