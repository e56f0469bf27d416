"""MLflow: what a run reports, the outbox that holds it while a server is away, and the writer that delivers it."""
