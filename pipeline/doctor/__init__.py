"""`graft doctor`: what is wrong with a machine, a cluster or a job's surroundings, and what to do about it."""
