"""A job's schedule, simulated: each step starts when its needs are done and its share of the machine is free."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.cluster.machine import num_cpus
from graftwork.pipeline.estimates.packing import Item, duration, pack
from graftwork.pipeline.estimates.sharing import most_in_a_pack, num_recording_tasks
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.specs.problems import SpecError
from graftwork.stages.registry import STAGES

TOLERANCE = 1e-9  # of shares that make up a GPU


# -- the machine, and the job played through


@dataclass(frozen=True)
class Machine:
    """What all steps share."""

    cpus: float
    gpus: float

    def takes(self, step: Step) -> tuple[str, float]:
        """What a step takes of it while it runs: GPUs where it has any, else CPUs; a share of a GPU is never made up of
        what is left of two."""
        resources = step.resources
        if not resources.gpu:
            return "cpu", self.cpus if step.spreads else min(self.cpus, step.workers * resources.cpu)
        each = resources.gpu if resources.gpu >= 1 else 1 / int(1 / resources.gpu)
        return "gpu", self.gpus if step.spreads else min(self.gpus, step.workers * each)


def machine_for(plan: Plan, gpus: int | None) -> Machine:
    """This machine's CPUs, and the GPUs given or, by default, as many as the plan's widest step takes at once.

    Raises SpecError where a step wants more.
    """
    widest = max(plan.steps, key=lambda step: step.workers * step.resources.gpu)
    wanted = math.ceil(widest.workers * widest.resources.gpu)
    if gpus is not None and gpus < wanted:
        raise SpecError([f"--gpus: got {gpus}; accepted: at least {wanted}, which {widest.name} takes at once"])
    cpus = max(step.workers * step.resources.cpu for step in plan.steps)
    return Machine(max(float(num_cpus()), cpus), float(wanted if gpus is None else gpus if wanted else 0))


@dataclass(frozen=True)
class StepTime:
    """What a step should take."""

    own: float  # seconds
    shared: float = 0.0  # seconds of the pass that it can share
    basis: Literal["done", "assumed", "none"] = "none"


@dataclass(frozen=True)
class _Task:
    """Steps that run in one task, and what it takes."""

    steps: tuple[str, ...]
    seconds: float
    pool: str
    amount: float


def simulate(
    steps: Mapping[str, Step], times: Mapping[str, StepTime], machine: Machine
) -> tuple[float, float, dict[str, float]]:
    """Run the steps in thought, each when what it needs is there and its share of the machine is free.

    Returns seconds to the end of the last, GPU seconds, and by stage the seconds for which its steps would have all
    GPUs, or all CPUs.
    """
    missing = {name: set(step.needs.values()) & steps.keys() for name, step in steps.items()}
    followers: dict[str, list[str]] = {}
    for name, needs in missing.items():
        for needed in needs:
            followers.setdefault(needed, []).append(name)
    free = {"cpu": machine.cpus, "gpu": machine.gpus}
    waiting = _tasks([steps[name] for name, needs in missing.items() if not needs], times, machine)
    running: list[tuple[float, int, _Task]] = []
    now, gpu_seconds, number = 0.0, 0.0, 0
    by_stage: dict[str, float] = {}
    sizes = {"cpu": machine.cpus, "gpu": machine.gpus}
    while waiting or running:
        still_waiting = []
        for task in waiting:
            if task.amount > free[task.pool] + TOLERANCE:
                still_waiting.append(task)
                continue
            free[task.pool] -= task.amount
            number += 1
            heapq.heappush(running, (now + task.seconds, number, task))
        waiting = still_waiting
        now, _, task = heapq.heappop(running)
        free[task.pool] += task.amount
        gpu_seconds += task.seconds * task.amount * (task.pool == "gpu")
        stage = steps[task.steps[0]].stage
        share = task.amount / sizes[task.pool] if task.amount else 0.0
        by_stage[stage] = by_stage.get(stage, 0.0) + task.seconds * share
        ready = []
        for name in task.steps:
            for follower in followers.get(name, ()):
                missing[follower].remove(name)
                ready += [steps[follower]] * (not missing[follower])
        waiting += _tasks(ready, times, machine)
    return now, gpu_seconds, by_stage


def _tasks(ready: Sequence[Step], times: Mapping[str, StepTime], machine: Machine) -> list[_Task]:
    """One a step, but for those that share a pass, which are packed."""
    tasks: list[_Task] = []
    sharing: dict[tuple[str, int], list[Step]] = {}  # by stage and workers
    for step in ready:
        if STAGES[step.stage].shares:
            sharing.setdefault((step.stage, step.workers), []).append(step)
        else:
            seconds = times[step.name].own + times[step.name].shared
            tasks.append(_Task((step.name,), seconds, *machine.takes(step)))
    for sites in sharing.values():
        tasks += _packed(sites, times, machine)
    return tasks


def _packed(sites: Sequence[Step], times: Mapping[str, StepTime], machine: Machine) -> list[_Task]:
    pool, amount = machine.takes(sites[0])
    slots = int((machine.gpus if pool == "gpu" else machine.cpus) / amount + TOLERANCE) if amount else 0
    items = [
        Item(step.name, times[step.name].own, depth=step.work.block if step.work is not None else 0) for step in sites
    ]
    shared = max(times[step.name].shared for step in sites)
    num_tasks = num_recording_tasks(sites, slots)
    before, within = (shared / num_tasks, 0.0) if num_tasks else (0.0, shared)
    tasks = []
    for number, one in enumerate(pack(items, slots, within, most=most_in_a_pack(sites))):
        waited = before if number < slots else 0.0  # by those that begin first
        tasks.append(_Task(tuple(item.name for item in one), waited + duration(one, within), pool, amount))
    return tasks
