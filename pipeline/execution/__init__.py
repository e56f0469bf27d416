"""A plan at work: the run, its scheduler, one Ray task, and the port through which people watch."""
