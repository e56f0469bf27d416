"""How steps become a job: plan, store, execute, track, and the command line."""
