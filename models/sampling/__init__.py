"""Samplers, and guidance."""
