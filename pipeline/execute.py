"""Execution: the steps that the store lacks become Ray tasks, chained by object refs. That is the job's DAG.

A task's result is a small `StepResult`, never data: artifacts go through the store. A lost worker is retried by Ray;
an error in the work fails its step at once, the steps that need it are skipped, and all others finish and are kept.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import ray

import stages
from cluster import runtime
from cluster.board import Board, News, Reporter
from pipeline.planning import Plan, Step
from pipeline.store import Origin, RottenArtifact, Store

POLL_SECONDS = 0.25
RETRIES = 3  # of a task whose worker is lost


class StepFailed(Exception):
    """The work of a step raised an error."""

    def __init__(self, step: str, problem: str, details: str, rotten: str | None) -> None:
        super().__init__(step, problem, details, rotten)
        self.step, self.problem, self.details = step, problem, details
        self.rotten = rotten  # the key of an artifact that was found damaged

    def __str__(self) -> str:
        return f"step {self.step} failed: {self.problem}"


@dataclass(frozen=True)
class StepResult:
    """What a task returns."""

    key: str
    seconds: float


class Watcher(Protocol):
    """Is told what happens while steps run."""

    def started(self, step: str) -> None: ...
    def news(self, news: News) -> None: ...
    def ended(self, step: str, result: StepResult) -> None: ...
    def failed(self, step: str, problem: str) -> None: ...
    def skipped(self, step: str, because_of: str) -> None: ...


def session(plan: Plan) -> AbstractContextManager[None]:
    """Ray, with room for each of the plan's steps."""
    return runtime.session((step.resources for step in plan.steps), together=_widest(plan))


def execute(plan: Plan, store: Store, run: str, git_commit: str | None, watcher: Watcher) -> list[StepFailed]:
    """Run what the store lacks, within a `session`; returns the failures when every step has come to its end."""
    states = plan.states(store)
    board = ray.remote(num_cpus=0)(Board).remote()
    refs: dict[str, Any] = {}
    for step in plan.steps:
        if states[step.name] != "cached":
            needed = [refs[name] for name in step.needs.values() if name in refs]
            refs[step.name] = _submit(step, plan, store, run, git_commit, Reporter(board, step.name), needed)
    return _watch(refs, board, watcher)


def _widest(plan: Plan) -> int:
    """The most workers that one step starts together."""
    searches = [layers.search.workers for layers in plan.job.learned().values()]
    return max(getattr(plan.job.weights, "workers", 1), plan.job.finetune.workers, *searches)


def _submit(
    step: Step, plan: Plan, store: Store, run: str, git_commit: str | None, report: Reporter, needed: list[Any]
) -> Any:
    keys = {role: plan[name].key for role, name in step.needs.items()}
    orchestrates = stages.STAGES[step.stage].orchestrates
    task = _run_step.options(
        name=step.name,
        num_cpus=0 if orchestrates else step.resources.cpu,
        num_gpus=0 if orchestrates else step.resources.gpu,
        max_retries=RETRIES,
        retry_exceptions=False,
    )
    origin = Origin(step=step.name, run=run, seconds=0, made="", git_commit=git_commit)
    return task.remote(step, keys, store, origin, report, *needed)


@ray.remote
def _run_step(
    step: Step, keys: Mapping[str, str], store: Store, origin: Origin, report: Reporter, *needed: StepResult
) -> StepResult:
    """Do a step's work and commit it. `needed` makes Ray wait for the steps before."""
    began = time.perf_counter()
    if store.manifest(step.key) is not None:  # another driver on this store was faster
        return StepResult(step.key, 0.0)
    report(0, 0)
    quiet()
    device = runtime.settle()
    try:
        context = stages.Context(
            step=step.name,
            params=step.params,
            inputs={role: store.artifact(key) for role, key in keys.items()},
            out=store.workplace(step.key),
            partial=store.partial(step.key),
            report=report,
            resources=step.resources,
            device=device,
        )
        stages.load(step.stage)(context)
        seconds = time.perf_counter() - began
        made = datetime.now(UTC).isoformat(timespec="seconds")
        store.commit(
            step.key, context.out, dict(step.identity), origin.model_copy(update={"seconds": seconds, "made": made})
        )
        return StepResult(step.key, seconds)
    except Exception as error:
        cause = _root_cause(error)
        rotten = cause.key if isinstance(cause, RottenArtifact) else None
        raise StepFailed(step.name, _one_line(cause), traceback.format_exc(), rotten) from None


def _watch(refs: Mapping[str, Any], board: Any, watcher: Watcher) -> list[StepFailed]:
    """Follow the tasks until all have ended."""
    failures: list[StepFailed] = []
    waiting = dict(refs)
    begun: set[str] = set()
    while waiting:
        ray.wait(list(waiting.values()), timeout=POLL_SECONDS)
        news: News = ray.get(board.read.remote())
        for name in news.progress.keys() - begun:
            watcher.started(name)
        begun |= news.progress.keys()
        watcher.news(news)
        ready, _ = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=0)
        for name in [name for name, ref in waiting.items() if ref in ready]:
            _end(name, waiting.pop(name), watcher, failures)
    return failures


def _end(name: str, ref: Any, watcher: Watcher, failures: list[StepFailed]) -> None:
    try:
        watcher.ended(name, ray.get(ref))
    except ray.exceptions.RayTaskError as error:
        failure = error.cause
        if not isinstance(failure, StepFailed):
            failure = StepFailed(name, _one_line(failure), str(error), None)
        if failure.step != name:  # Ray hands a task the error of what it needed
            watcher.skipped(name, failure.step)
            return
        failures.append(failure)
        watcher.failed(name, failure.problem)
    except ray.exceptions.RayError as error:
        failure = StepFailed(name, f"its worker was lost {RETRIES + 1} times: {_one_line(error)}", str(error), None)
        failures.append(failure)
        watcher.failed(name, failure.problem)


def _root_cause(error: BaseException) -> BaseException:
    """The error that a task of the step raised, below what Ray wraps around it."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def quiet() -> None:
    """Keep what libraries say of themselves out of a step's process."""
    for library in ("DeepSpeed", "ray"):
        logging.getLogger(library).setLevel(logging.ERROR)
