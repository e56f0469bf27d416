"""Families of pretrained transformers, and the parallel blocks that edits make of them."""
