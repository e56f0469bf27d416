"""torch's private API: all of it that is used, in one place, as it is in torch 2.6 to 2.15."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T", bound=Callable[..., Any])


def move_towards(averages: list[Tensor], values: list[Tensor], share: float) -> None:
    """Move each average by `share` of its way to its value, in place: torch.lerp_ over all of them in one call."""
    torch._foreach_lerp_(averages, values, share)


def constant_when_compiled(function: T) -> T:
    """Have dynamo call `function` while it traces, and take the answer for a constant; arguments have to be strings.

    torch.compiler.assume_constant_result is the public way, and would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def memory_events(profiler: Any) -> list[tuple[int, int]]:
    """Return (time in ns, bytes) of each allocation on the CPU that a profile saw; frees have negative bytes."""
    return sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    )


def group_store() -> Any:
    """Return the store (a torch.distributed.Store) by which this process's torch.distributed group was formed."""
    return torch.distributed.distributed_c10d._get_default_store()
