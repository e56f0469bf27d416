"""From a job to a plan: its steps, their keys, fingerprints of outside files, and checks before the start."""
