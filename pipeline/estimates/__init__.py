"""How long the rest of a job takes and on what: history, a simulated schedule, and how sites share tasks."""
