"""Where things run: Ray's runtime, progress across processes, and the launcher of Ray Train with DeepSpeed."""
