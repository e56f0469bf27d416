"""Learned selection: gates over what a site may hold, and budgets over a whole model."""
