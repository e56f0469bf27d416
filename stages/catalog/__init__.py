"""A file a stage: its parameters, its steps in a job, their FLOPs, its version and how it is run. No torch, no Ray.

`inputs` and `flops` are no stages: they have what several of them need.
"""
