"""How fast a device is assumed to be, when nothing of the kind was measured yet."""

from __future__ import annotations

from collections.abc import Iterable

from graftwork.pipeline.planning.plan import Step
from graftwork.specs.resources import StepResources
from graftwork.specs.training import Precision

# Dense peak by the vendor's data sheets, FLOP/s by precision, by Ray's names of accelerators; half is assumed.
PEAKS: dict[str, dict[Precision, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12},
}
USUAL_GPU = "H100"
CORE = 25e9  # FLOP/s of a CPU's core: half of what sampling the digits reaches on one


def gpu_kind(resources: StepResources) -> str:
    """By the accelerator that the spec asks for, as Ray names it."""
    asked = [name.removeprefix("accelerator_type:") for name in resources.custom]
    return next((name for name in asked if name in PEAKS), USUAL_GPU)


def assumed_speed(step: Step) -> float:
    """FLOP/s of a worker, where nothing like it was done: half of the peak of what it takes."""
    resources = step.resources
    if not resources.gpu:
        return CORE
    return PEAKS[gpu_kind(resources)][step.precision] / 2 * resources.gpu


def assumption(resources: Iterable[StepResources]) -> str:
    """The same for people."""
    told = (f"half the peak of {gpu_kind(one)}" if one.gpu else f"{CORE / 1e9:g} GFLOP/s a core" for one in resources)
    return " or ".join(dict.fromkeys(told))
