"""Where things run: Ray's runtime, progress across processes, the launcher of trainings, and DeepSpeed's engine."""
