"""Texts: read, cleaned, cut into tokens, and encoded once for all stages."""
