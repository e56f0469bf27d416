"""How much memory a step that scores may keep streams in."""

from __future__ import annotations

import torch

from graftwork.cluster.machine import available_memory, num_cpus
from graftwork.specs.resources import StepResources
from graftwork.stages.distillation.sources import gpu_memory

MEMORY_SHARE = 0.25  # of what a task has of its device


def stream_room(device: torch.device, resources: StepResources) -> int:
    """Return the bytes that a task may keep streams in, on its device."""
    if device.type == "cuda":
        return int(MEMORY_SHARE * gpu_memory(device, resources.gpu))
    if resources.memory is not None:
        return int(MEMORY_SHARE * resources.memory)
    neighbours = num_cpus() / max(resources.cpu, 1.0)
    return int(MEMORY_SHARE * available_memory() / max(neighbours, 1.0))
