"""Trainings on several workers: the loop, its engine and batches, and the stages `base` and `finetune`."""
