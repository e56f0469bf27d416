"""DeepSpeed's private API: all of it that is used, in one place, as it is in DeepSpeed 0.19."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor

# What each ZeRO optimizer calls its flat fp32 weights.
FLATS = {
    1: ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "single_partition_of_fp32_groups"),
    2: ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "single_partition_of_fp32_groups"),
    3: ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "fp32_partitioned_groups_flat"),
}


def skip_probes() -> None:
    """Have DeepSpeed ask for none of its compiled operations, of which none is used here.

    Asked for this table the first time, it probes compilers and GPUs for all of them, and on a CPU would then compile
    one for inference.
    """
    vars(deepspeed.ops)["__compatible_ops__"] = {}


def flat_weights(optimizer: Any, zero: int) -> list[Tensor]:
    """Return this worker's flat fp32 weights, of an optimizer of this ZeRO stage."""
    return list(getattr(optimizer, FLATS[zero][2]))


def part_size(parameter: Any) -> int:
    """Return how many elements of a parameter each worker has under ZeRO 3, padding included."""
    return int(parameter.ds_tensor.ds_numel)
