"""One Ray task: the steps that it does, each under its lease, and what it says of an error."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import ray

from graftwork.cluster import memory
from graftwork.cluster.board import Reporter, StopSignal
from graftwork.cluster.session import runtime
from graftwork.pipeline.execution import shared_pass
from graftwork.pipeline.execution.shared_pass import Recordings
from graftwork.pipeline.planning.plan import Step
from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import LeaseOwner, LeaseSnapshot
from graftwork.pipeline.store.manifest import CPU, Origin, RottenArtifact, WorkDone
from graftwork.specs.problems import plain
from graftwork.specs.resources import StepResources
from graftwork.specs.secrets import redacted
from graftwork.stages import contract
from graftwork.stages.decisions import decisions_in
from graftwork.stages.registry import STAGES

if TYPE_CHECKING:
    import torch

ACCELERATOR = "accelerator_type:"  # begins Ray's names of resources that are models of GPUs


class StepFailed(Exception):
    """The work of a step raised an error."""

    def __init__(self, step: str, problem: str, details: str, rotten: str | None, repeats: bool = False) -> None:
        super().__init__(step, problem, details, rotten, repeats)
        self.step, self.problem, self.details = step, problem, details
        self.rotten = rotten  # the key of an artifact that was found damaged
        self.repeats = repeats  # whether the same work on the same files comes to the same error

    def __str__(self) -> str:
        return f"step {self.step} failed: {self.problem}"


@dataclass(frozen=True)
class StepResult:
    """What a task says of a step.

    done: the artifact is there. leased: another driver has the lease. blocked: what it needs is not there.
    stopped: what it had done is saved. failed: the work raised an error.
    """

    step: str
    key: str
    state: Literal["done", "leased", "blocked", "stopped", "failed"]
    seconds: float = 0.0
    lease: LeaseSnapshot | None = None
    failure: StepFailed | None = None


@dataclass(frozen=True)
class Work:
    """What a task is sent."""

    step: Step
    keys: Mapping[str, str]  # role -> key of what fills it
    awaited: Sequence[str]  # the steps before it that another task is doing
    store: Store
    origin: Origin
    report: Reporter
    stopping: StopSignal
    task: str
    over: LeaseSnapshot | None  # a lease that has expired
    recorded: Recordings = ()  # what tasks before left for it


def _do_steps(works: Sequence[Work], *before: Sequence[StepResult]) -> list[StepResult]:
    """Do steps one after another, each unaffected by an error in others. Ray first waits for the tasks `before`."""
    done = {result.step for results in before for result in results if result.state == "done"}
    state: dict[str, Any] = {}
    results = []
    for number, work in enumerate(works):
        task_scope = contract.TaskScope(
            next=[other.step.params for other in works[number + 1 :]],
            partials=[other.store.partial(other.step.key) for other in works[number + 1 :]],
            state=state,
            recorded=partial(shared_pass.fetch, work.recorded) if work.recorded else None,
        )
        result = _run_step(work, done, task_scope)
        if result.state in ("done", "failed"):
            work.report.ended(result)
        results.append(result)
    return results


_run_steps = ray.remote(_do_steps)
_run_steps_on_gpu = ray.remote(max_calls=1)(_do_steps)  # its process ends with it


def _run_step(work: Work, done: Collection[str], task_scope: contract.TaskScope) -> StepResult:
    """Do a step's work and commit it, under its lease."""
    step = work.step
    try:
        return _attempt(work, done, task_scope)
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, contract.Stopped):
            return StepResult(step.name, step.key, "stopped")
        rotten = cause.key if isinstance(cause, RottenArtifact) else None
        details = redacted(traceback.format_exc())
        failure = StepFailed(step.name, _problem(work, cause), details, rotten, _repeats(cause))
        return StepResult(step.name, step.key, "failed", failure=failure)


def _attempt(work: Work, done: Collection[str], task_scope: contract.TaskScope) -> StepResult:
    name, key, store = work.step.name, work.step.key, work.store
    if store.manifest(key) is not None:  # another driver on this store was faster
        return StepResult(name, key, "done")
    if any(needed not in done for needed in work.awaited):
        return StepResult(name, key, "blocked")
    if work.stopping.now():
        return StepResult(name, key, "stopped")
    taken = leases.take(store, key, LeaseOwner.me(work.origin.run, work.task), over=work.over)
    if isinstance(taken, LeaseSnapshot):
        return StepResult(name, key, "leased", lease=taken)
    with leases.releasing(taken):
        # It may have been committed between the first look and the lease.
        seconds = 0.0 if store.manifest(key) is not None else _do(work, task_scope)
        return StepResult(name, key, "done", seconds=seconds)


def _do(work: Work, task_scope: contract.TaskScope) -> float:
    """The step's work, and its commit; returns the seconds that the work took."""
    step, store = work.step, work.store
    began = time.perf_counter()
    work.report(0, 0)
    quiet()
    context = contract.Context(
        step=step.name,
        params=step.params,
        inputs={role: store.artifact(key) for role, key in work.keys.items()},
        out=store.workplace(step.key),
        partial=store.partial(step.key),
        report=work.report,
        resources=step.resources,
        device=runtime.settle(),
        stopping=work.stopping,
        task_scope=task_scope,
        images=step.images,
    )
    with decisions_in(context.out, step.resources):
        STAGES[step.stage].run(context)
    step.require_same_files()
    seconds = time.perf_counter() - began
    made = datetime.now(UTC).isoformat(timespec="seconds")
    origin = work.origin.model_copy(update={"seconds": seconds, "made": made, "work": work_done(step, context.device)})
    store.commit(step.key, context.out, dict(step.identity), origin)
    return seconds


def work_done(step: Step, device: torch.device) -> WorkDone:
    """Return what the step's manifest keeps for later estimates. device: of its task."""
    return WorkDone(
        flops=None if step.work is None else step.work.own,
        shared_flops=0.0 if step.work is None else step.work.shared,
        device=_device_model(step.resources, device),
        devices=step.devices,
        workers=step.workers,
        precision=step.precision,
    )


def _device_model(resources: StepResources, device: torch.device) -> str:
    """Return "cpu", or the model of the GPUs as torch names it, or as the job asks for it if the task has none."""
    if not resources.gpu:
        return CPU
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    asked = [name.removeprefix(ACCELERATOR) for name in resources.custom if name.startswith(ACCELERATOR)]
    return asked[0] if asked else "gpu"


def _root_cause(error: BaseException) -> BaseException:
    """The error that a task of the step raised, below what Ray wraps around it."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _repeats(cause: BaseException) -> bool:
    """Whether an error is of the job's code or data, and not of the machine, the network or the store."""
    return isinstance(cause, ValueError | TypeError | ArithmeticError | LookupError | AttributeError | AssertionError)


def _problem(work: Work, cause: BaseException) -> str:
    """What went wrong, in one line, and where it is known what to do."""
    if (told := work.store.explain(cause)) is not None:
        return str(told)
    return _out_of_memory(work.step.stage) if is_out_of_memory(cause) else _one_line(cause)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of the machine as Ray guards it, or of what the system would give."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or memory.is_short(error)


def _out_of_memory(stage: str) -> str:
    setting = STAGES[stage].memory
    advice = f"lower {setting}" if setting else f"ask for a node that has more by resources.{stage}.memory"
    return f"out of memory; {advice}"


def _one_line(error: BaseException) -> str:
    text = plain(redacted(" ".join(str(error).split())))
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def quiet() -> None:
    """Keep what libraries say of themselves out of a step's process."""
    for library in ("DeepSpeed", "ray"):
        logging.getLogger(library).setLevel(logging.ERROR)
