"""Estimates: what is left of a job should take, before it runs. No Ray, no torch.

A step brings its FLOPs from the plan, and an artifact's manifest has those of the step that made it. How fast they are
done is taken from the artifact of the same stage, on the same kind of device, whose FLOPs are nearest: what earlier
runs in this store really took. Where there is none that says so, a speed is assumed, and said to be. The wall time is
that of the job's steps played through, each when what it needs is there and its share of the machine is free. An
estimate is kept in the run's record, to be held against what the run took.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from graftwork.pipeline.estimates.history import LOAD_SECONDS, History
from graftwork.pipeline.estimates.simulate import Machine, StepTime, simulate
from graftwork.pipeline.estimates.speeds import assumed_speed, assumption
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.pipeline.runs.record import Expected

START_SECONDS = 6.0  # that Ray takes to start


def estimate(plan: Plan, undone: Iterable[str], history: History, machine: Machine) -> Expected:
    """What the steps that are not done should take; those without any basis count as nothing, and are named."""
    names = set(undone)
    steps = {step.name: step for step in plan.steps if step.name in names}
    times = {step.name: _step_time(step, history, machine) for step in steps.values()}
    seconds, gpu_seconds, by_stage = simulate(steps, times, machine)
    whole = sum(by_stage.values())
    return Expected(
        seconds=seconds + (START_SECONDS if steps else 0.0),
        gpu_hours=gpu_seconds / 3600,
        cpus=machine.cpus,
        gpus=machine.gpus,
        shares={stage: part / whole for stage, part in by_stage.items()} if whole else {},
        assumption=assumption([step.resources for name, step in steps.items() if times[name].basis == "assumed"]),
        assumed=[name for name, time in times.items() if time.basis == "assumed"],
        unknown=[name for name, time in times.items() if time.basis == "none"],
    )


def _step_time(step: Step, history: History, machine: Machine) -> StepTime:
    work, seconds = step.work, history.nearest(step)
    if work is None:
        return StepTime(0.0) if seconds is None else StepTime(seconds, basis="done")
    basis: Literal["done", "assumed"] = "done"
    if seconds is None:
        basis = "assumed"
        _, devices = machine.takes(step)
        side_by_side = devices / (step.resources.gpu or 1.0) if step.spreads else step.workers
        seconds = LOAD_SECONDS + work.total / (assumed_speed(step) * side_by_side)
    return StepTime(seconds * work.own / work.total, seconds * work.shared / work.total, basis)
