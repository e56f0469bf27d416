"""Trainings on workers that form one group: the launcher, on CPUs and on GPUs, and DeepSpeed's engine."""
