"""Checks of machines: packages, limits, drivers and GPUs, here and on all nodes of a cluster."""
