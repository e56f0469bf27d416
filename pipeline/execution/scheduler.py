"""Execution: the steps that the store lacks become Ray tasks, chained by object refs. That is the job's DAG.

A task does one step, or a pack of steps that share work, such as the rootstock's pass in distillation. It returns a
small `StepResult` a step, never data: artifacts go through the store, and only what sites share stays with Ray. Each
step is done under its own lease; where another driver on the store has it, the task goes on and the step is tried again
when that driver is done, or gone. A lost worker is retried by Ray; an error in the work fails its step at once, the
steps that need it are skipped, and all others finish and are kept. Asked to stop, tasks save a checkpoint and end.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import ray

from graftwork.cluster.board import Board, News, Reporter, StopSignal
from graftwork.cluster.session import runtime
from graftwork.pipeline.estimates.packing import pack
from graftwork.pipeline.estimates.sharing import most_in_a_pack, num_recording_tasks, site_items, slots_of
from graftwork.pipeline.execution import shared_pass
from graftwork.pipeline.execution.progress import Every, ShortageWatch, StepProgress, Task
from graftwork.pipeline.execution.shared_pass import Recordings
from graftwork.pipeline.execution.task import (
    StepFailed,
    StepResult,
    Work,
    _one_line,
    _out_of_memory,
    _repeats,
    _root_cause,
    _run_steps,
    _run_steps_on_gpu,
)
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import LeaseOwner, LeaseWatch
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.job import JobSpec
from graftwork.stages.registry import STAGES

POLL_SECONDS = 0.25
LEASE_POLL_SECONDS = 1.0
CLUSTER_POLL_SECONDS = 3.0
RETRIES = 3  # of a task whose worker is lost
STOP_SECONDS = 30.0  # that tasks are given to save what they have, beside the writing of a training's checkpoint
STATES = 4  # of each parameter in a checkpoint, in fp32: the weight, its average and two moments
CHECKPOINT_BYTES_A_SECOND = 1e8  # gathered, written, hashed and put into a store over a network
# What steps import that takes long and knows nothing of Ray, in the order of need. The last two come unasked: with any
# optimizer, and with DeepSpeed's engine.
WARM = (
    "torch",
    "graftwork.stages.data.sources",
    "graftwork.stages.evaluation.classifier",
    "graftwork.stages.pictures.pictures",
    "matplotlib.backends.backend_agg",
    "graftwork.cluster.training.deepspeed_engine",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


class Watcher(Protocol):
    """Is told what happens while steps run."""

    def started(self, step: str) -> None: ...
    def news(self, news: News) -> None: ...
    def ended(self, step: str, result: StepResult) -> None: ...
    def failed(self, step: str, problem: str) -> None: ...
    def skipped(self, step: str, because_of: str) -> None: ...
    def waiting(self, step: str, holder: LeaseOwner) -> None: ...
    def made_elsewhere(self, step: str) -> None: ...  # another driver made its artifact
    def stop_wanted(self) -> bool: ...
    def short(self, step: str, wanted: str) -> None: ...  # no node of the cluster can hold it


def session(plan: Plan) -> AbstractContextManager[None]:
    """Ray, with room for each of the plan's steps."""
    widest = max(step.workers for step in plan.steps)  # workers that one step starts together
    return runtime.session((step.resources for step in plan.steps), min_parallel=widest, warm=WARM)


def stop_seconds(job: JobSpec, at_work: Collection[str]) -> float:
    """Return how long tasks are given to save what they have, by the stages that are at work."""
    if not any(STAGES[stage].trains for stage in at_work):
        return STOP_SECONDS
    model = rootstock_cost(job.model, job.place(), job.codec.latent_channels(job.data), num_classes=1)
    return STOP_SECONDS + STATES * 4 * model.params / CHECKPOINT_BYTES_A_SECOND


class Execution:
    """One pass over what the store lacks, within a `session`."""

    def __init__(self, plan: Plan, store: Store, run: str, git_commit: str | None, watcher: Watcher) -> None:
        self.plan, self.store, self.run, self.git_commit, self.watcher = plan, store, run, git_commit, watcher
        self.board = ray.remote(num_cpus=0)(Board).remote()
        self.id = uuid.uuid4().hex
        states = plan.states(store)
        self.steps = {
            step.name: StepProgress(step, "done" if states[step.name] == "cached" else "waiting") for step in plan.steps
        }
        self.tasks: dict[Any, Task] = {}  # by ref; a step that is done may have one that has not ended
        self.failures: list[StepFailed] = []
        self.stopping_since: float | None = None
        self.shortage = ShortageWatch()
        self.news_due = Every(POLL_SECONDS)
        self.leases_due, self.cluster_due = Every(LEASE_POLL_SECONDS), Every(CLUSTER_POLL_SECONDS)

    @property
    def open(self) -> list[StepProgress]:
        """The steps that have yet to come to their end."""
        return [one for one in self.steps.values() if one.open]

    def go(self) -> list[StepFailed]:
        """Until every step has come to its end; returns the failures. Asked to stop, it leaves steps open."""
        while self.open and not self._stopped():
            self._submit()
            if self.tasks:
                ray.wait(list(self.tasks), timeout=POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
            ended = self._ended()
            if self.news_due() or ended:
                self._pass_on_news()
            for ref in ended:
                self._end(ref)
            if self.leases_due():
                self._look_at_leases()
            if self.cluster_due():
                self._look_at_cluster()
        self._pass_on_news()
        return self.failures

    # -- tasks begin

    def _submit(self) -> None:
        """Give Ray each open step whose needs are done or are with Ray."""
        if self.stopping_since is not None:
            return
        sharing: dict[tuple[str, int], list[Step]] = {}  # by stage and workers
        held_back: set[str] = set()  # stages whose steps start together, when the last of them can
        for one in self.open:
            if one.task is not None or one.state == "leased elsewhere":
                continue
            stage, needs = STAGES[one.step.stage], [self.steps[needed] for needed in one.step.needs.values()]
            if stage.shares and not one.alone:
                if all(need.done for need in needs):
                    sharing.setdefault((one.step.stage, one.step.workers), []).append(one.step)
                elif stage.together:
                    held_back.add(one.step.stage)
            elif all(need.done or need.task is not None for need in needs):
                self._start([one.step], (), {})
        sharing = {name: steps for name, steps in sharing.items() if name[0] not in held_back}
        for sites in sharing.values():
            self._start_sharing(sites)

    def _start_sharing(self, sites: Sequence[Step]) -> None:
        """Sites put together for the room that there is now; before them, where it pays, the pass that all share."""
        items, shared = site_items(self.plan, [step.name for step in sites])
        resources = sites[0].resources
        slots = slots_of(sites[0], runtime.room_for(resources))
        num_tasks = num_recording_tasks(sites, slots)
        if num_tasks and not shared_pass.fits(items, num_tasks, resources):
            num_tasks = 0
        packed = pack(items, slots, 0.0 if num_tasks else shared, most=most_in_a_pack(sites))
        packs = [[self.plan[item.name] for item in one] for one in packed]
        waited, recorded = list[Any](), dict[str, Recordings]()
        if num_tasks:
            asked = shared_pass.Pass(sites, self._keys(sites[0]), self.store, StopSignal(self.board))
            waited, recorded = asked.start(num_tasks, [Reporter(self.board, steps[0].name) for steps in packs])
        for steps in packs:
            self._start(steps, waited, recorded)

    def _start(self, steps: Sequence[Step], waited: Sequence[Any], recorded: Mapping[str, Recordings]) -> None:
        """One task for these steps, to begin when the tasks `waited` for have left what they recorded."""
        first, *others = steps
        # A GPU that comes by `options` does not end the process: its memory and its choice of a GPU would stay.
        remote = _run_steps_on_gpu if first.resources.gpu else _run_steps
        task = remote.options(
            name=first.name + (f" and {len(others)} more" if others else ""),
            max_retries=RETRIES,
            retry_exceptions=False,
            **runtime.options(first.resources, idle=STAGES[first.stage].orchestrates or first.workers > 1),
        )
        awaited = {self.steps[name].task: None for step in steps for name in self._awaited(step)}
        ref = task.remote([self._work(step, recorded.get(step.name, ())) for step in steps], *waited, *awaited)
        self.tasks[ref] = Task(tuple(step.name for step in steps), fed_by_recording=bool(recorded))
        for step in steps:
            self.steps[step.name].task = ref

    def _keys(self, step: Step) -> dict[str, str]:
        return {role: self.plan[name].key for role, name in step.needs.items()}

    def _work(self, step: Step, recorded: Recordings) -> Work:
        progress = self.steps[step.name]
        expired, progress.expired = progress.expired, None
        return Work(
            step=step,
            keys=self._keys(step),
            awaited=self._awaited(step),
            store=self.store,
            origin=Origin(step=step.name, run=self.run, seconds=0, made="", git_commit=self.git_commit),
            report=Reporter(self.board, step.name),
            stopping=StopSignal(self.board),
            task=f"{self.id}/{step.name}",
            over=expired,
            recorded=recorded,
        )

    def _awaited(self, step: Step) -> tuple[str, ...]:
        """What the step needs and some task is still at."""
        return tuple(name for name in step.needs.values() if not self.steps[name].done)

    # -- tasks end

    def _pass_on_news(self) -> None:
        news: News = ray.get(self.board.read.remote())
        # What a step wrote last may come after its end: its points are kept, its progress is no news any more.
        news.progress = {
            one.step.name: news.progress[one.step.name] for one in self.open if one.step.name in news.progress
        }
        for name in news.progress:
            if not self.steps[name].begun:
                self.steps[name].begun = True
                self.watcher.started(name)
        for point in news.points:
            metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in point.metrics.items())
            self.steps[point.step].last_metrics = f"at {point.done}: {metrics}"
        self.watcher.news(news)
        for result in news.results:
            self._settle(result)

    def _ended(self) -> list[Any]:
        if not self.tasks:
            return []
        ended, _ = ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        return ended

    def _end(self, ref: Any) -> None:
        """Take a task's results; what a lost task says nothing of is done again, or has failed."""
        task = self.tasks.pop(ref)
        lost: ray.exceptions.RayError | None = None
        try:
            results: list[StepResult] = ray.get(ref)
        except ray.exceptions.RayError as error:
            results, lost = [], error
            runtime.free_group_of(ref)
        for result in results:
            self._settle(result)
        for one in (self.steps[name] for name in task.steps):
            if one.task is not ref:
                continue
            one.task = None
            if lost is not None and one.open:
                self._lose(one, lost, alone=len(task.steps) == 1 and not task.fed_by_recording)

    def _settle(self, result: StepResult) -> None:
        """What a task said of a step: of one that was done or failed on the board too, before the task ended."""
        one = self.steps[result.step]
        if not one.open:
            return
        if result.state == "done":
            one.state = "done"
            self.watcher.ended(result.step, result)
        elif result.failure is not None:
            self._fail(one, result.failure)
        elif result.lease is not None:
            one.state, one.lease = "leased elsewhere", LeaseWatch(result.lease)
            self.watcher.waiting(result.step, result.lease.holder)
        elif result.state == "blocked":
            self._block(one)

    def _block(self, one: StepProgress) -> None:
        """Something that the step needs is not there: it waits for that, or is given up."""
        for missing in self.steps.values():
            if missing.given_up and one.step.name in self.plan.following(missing.step.name):
                self._skip(one, missing.step.name)
                return

    def _lose(self, one: StepProgress, error: ray.exceptions.RayError, alone: bool) -> None:
        """Ray could not do the task, try as it would."""
        if self._awaited(one.step):
            self._block(one)  # Ray hands a task the error of what it waited for
        elif not alone:
            one.alone = True  # which of several was at fault nobody knows
        else:
            self._fail(one, _failure_of(one.step, error))

    def _fail(self, one: StepProgress, failure: StepFailed) -> None:
        if one.last_metrics:
            problem = f"{failure.problem}; last metrics {one.last_metrics}"
            failure = StepFailed(failure.step, problem, failure.details, failure.rotten, failure.repeats)
        self.failures.append(failure)
        one.state = "failed"
        self.watcher.failed(failure.step, failure.problem)
        following = self.plan.following(failure.step)
        for other in self.open:
            if other.step.name in following and other.task is None:
                self._skip(other, failure.step)

    def _skip(self, one: StepProgress, because_of: str) -> None:
        one.state, one.lease = "skipped", None
        self.watcher.skipped(one.step.name, because_of)

    # -- what others do

    def _look_at_leases(self) -> None:
        """Steps that others are at: done by them, or free to be taken."""
        for one in self.open:
            if one.lease is None:
                continue
            if self.store.manifest(one.step.key) is not None:
                one.state, one.lease = "done", None
                self.watcher.made_elsewhere(one.step.name)
            elif one.lease.expired(self.store):
                one.state, one.expired, one.lease = "waiting", one.lease.last, None

    def _look_at_cluster(self) -> None:
        """Free what lost tasks left taken, and tell whose node is missing."""
        runtime.free_orphaned_groups()
        for name, wanted in self.shortage.look([one.step for one in self.open if one.task is not None]):
            self.watcher.short(name, wanted)

    def _stopped(self) -> bool:
        """Whether it was asked to stop and everything has come to rest, or had the time to."""
        if self.stopping_since is None:
            if not self.watcher.stop_wanted():
                return False
            self.stopping_since = time.monotonic()
            self.board.stop.remote()
        at_work = {self.plan[name].stage for task in self.tasks.values() for name in task.steps}
        limit = stop_seconds(self.plan.job, at_work)
        return not self.tasks or time.monotonic() - self.stopping_since > limit


def _failure_of(step: Step, error: ray.exceptions.RayError) -> StepFailed:
    """Return the failure of a step whose task, alone, Ray could not do."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return StepFailed(step.name, _out_of_memory(step.stage), str(error), None)
    if isinstance(error, ray.exceptions.RayTaskError):
        return StepFailed(step.name, _one_line(error.cause), str(error), None, _repeats(_root_cause(error)))
    problem = f"its worker was lost {RETRIES + 1} times: {_one_line(error)}"
    return StepFailed(step.name, problem, str(error), None)
