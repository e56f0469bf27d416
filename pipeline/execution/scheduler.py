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
from graftwork.pipeline.estimates.sharing import num_recording_tasks, site_items
from graftwork.pipeline.execution import shared_pass
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
from graftwork.pipeline.store.leases import LeaseOwner, LeaseSnapshot, LeaseWatch
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.job import JobSpec
from graftwork.stages.registry import STAGES

POLL_SECONDS = 0.25
LEASE_POLL_SECONDS = 1.0
CLUSTER_POLL_SECONDS = 3.0
RETRIES = 3  # of a task whose worker is lost
SHORTAGE_SECONDS = 30.0  # without any node for a step, before that is told
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
    def taken(self, step: str) -> None: ...  # another driver made its artifact
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
        self.ready = {name for name, state in states.items() if state == "cached"}
        self.open = [step.name for step in plan.steps if step.name not in self.ready]  # neither ready nor given up
        self.given_up: set[str] = set()
        self.tasks: dict[Any, tuple[str, ...]] = {}  # ref -> the steps that the task does
        self.refs: dict[str, Any] = {}  # step -> the ref of its task
        self.helped: set[Any] = set()  # refs of tasks that others recorded for
        self.alone: set[str] = set()  # were lost together with others
        self.held: dict[str, LeaseWatch] = {}
        self.expired: dict[str, LeaseSnapshot] = {}
        self.begun: set[str] = set()
        self.failures: list[StepFailed] = []
        self.last_metrics: dict[str, str] = {}
        self.stopping_since: float | None = None
        self.news_read = 0.0
        self.leases_seen = 0.0
        self.had_room = dict.fromkeys(self.open, time.monotonic())  # when last seen; what was told is taken out
        self.cluster_seen = 0.0

    def go(self) -> list[StepFailed]:
        """Until every step has come to its end; returns the failures. Asked to stop, it leaves steps open."""
        while self.open and not self._stopped():
            self._submit()
            if self.tasks:
                ray.wait(list(self.tasks), timeout=POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
            ended = self._ended()
            if ended or time.monotonic() - self.news_read > POLL_SECONDS:
                self._pass_on_news()
            for ref in ended:
                self._end(ref)
            self._look_at_leases()
            self._look_at_cluster()
        self._pass_on_news()
        return self.failures

    def _submit(self) -> None:
        """Give Ray each open step whose needs are ready or are with Ray."""
        if self.stopping_since is not None:
            return
        sharing: dict[str, list[Step]] = {}
        for name in self.open:
            if name in self.refs or name in self.held:
                continue
            step = self.plan[name]
            if STAGES[step.stage].shares and name not in self.alone:
                if all(needed in self.ready for needed in step.needs.values()):
                    sharing.setdefault(step.stage, []).append(step)
            elif all(needed in self.ready or needed in self.refs for needed in step.needs.values()):
                self._start([step], (), {})
        for sites in sharing.values():
            self._start_sharing(sites)

    def _start_sharing(self, sites: Sequence[Step]) -> None:
        """Sites put together for the room that there is now; before them, where it pays, the pass that all share."""
        items, shared = site_items(self.plan, [step.name for step in sites])
        resources = sites[0].resources
        slots = runtime.room_for(resources)
        num_tasks = num_recording_tasks(sites, slots)
        if num_tasks and not shared_pass.fits(items, num_tasks, resources):
            num_tasks = 0
        packs = [[self.plan[item.name] for item in one] for one in pack(items, slots, 0.0 if num_tasks else shared)]
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
            **runtime.options(first.resources, idle=STAGES[first.stage].orchestrates),
        )
        awaited = {self.refs[name]: None for step in steps for name in self._awaited(step)}
        ref = task.remote([self._work(step, recorded.get(step.name, ())) for step in steps], *waited, *awaited)
        self.tasks[ref] = tuple(step.name for step in steps)
        if recorded:
            self.helped.add(ref)
        self.refs |= {step.name: ref for step in steps}

    def _keys(self, step: Step) -> dict[str, str]:
        return {role: self.plan[name].key for role, name in step.needs.items()}

    def _work(self, step: Step, recorded: Recordings) -> Work:
        return Work(
            step=step,
            keys=self._keys(step),
            awaited=self._awaited(step),
            store=self.store,
            origin=Origin(step=step.name, run=self.run, seconds=0, made="", git_commit=self.git_commit),
            report=Reporter(self.board, step.name),
            stopping=StopSignal(self.board),
            task=f"{self.id}/{step.name}",
            over=self.expired.pop(step.name, None),
            recorded=recorded,
        )

    def _awaited(self, step: Step) -> tuple[str, ...]:
        """What the step needs and some task is still at."""
        return tuple(name for name in step.needs.values() if name not in self.ready)

    def _pass_on_news(self) -> None:
        self.news_read = time.monotonic()
        news: News = ray.get(self.board.read.remote())
        # What a step wrote last may come after its end: its points are kept, its progress is no news any more.
        news.progress = {name: news.progress[name] for name in self.open if name in news.progress}
        for name in news.progress.keys() - self.begun:
            self.watcher.started(name)
        self.begun |= news.progress.keys()
        for point in news.points:
            metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in point.metrics.items())
            self.last_metrics[point.step] = f"at {point.done}: {metrics}"
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
        names = self.tasks.pop(ref)
        lost: ray.exceptions.RayError | None = None
        try:
            results: list[StepResult] = ray.get(ref)
        except ray.exceptions.RayError as error:
            results, lost = [], error
            runtime.free_group_of(ref)
        for result in results:
            self._settle(result)
        for name in names:
            if self.refs.get(name) is not ref:
                continue
            del self.refs[name]
            if lost is not None and name in self.open:
                self._lose(name, lost, alone=len(names) == 1 and ref not in self.helped)

    def _settle(self, result: StepResult) -> None:
        """What a task said of a step: of one that was done or failed on the board too, before the task ended."""
        name = result.step
        if name not in self.open:
            return
        if result.state == "done":
            self._close(name)
            self.watcher.ended(name, result)
        elif result.failure is not None:
            self._fail(result.failure)
        elif result.held is not None:
            self.held[name] = LeaseWatch(result.held)
            self.watcher.waiting(name, result.held.holder)
        elif result.state == "blocked":
            self._block(name)

    def _block(self, name: str) -> None:
        """Something that the step needs is not there: it waits for that, or is given up."""
        missing = next((gone for gone in self.given_up if name in self.plan.following(gone)), None)
        if missing is not None:
            self._skip(name, missing)

    def _lose(self, name: str, error: ray.exceptions.RayError, alone: bool) -> None:
        """Ray could not do the task, try as it would."""
        if any(needed not in self.ready for needed in self.plan[name].needs.values()):
            self._block(name)  # Ray hands a task the error of what it waited for
        elif not alone:
            self.alone.add(name)  # which of several was at fault nobody knows
        elif isinstance(error, ray.exceptions.OutOfMemoryError):
            self._fail(StepFailed(name, _out_of_memory(self.plan[name].stage), str(error), None))
        elif isinstance(error, ray.exceptions.RayTaskError):
            self._fail(StepFailed(name, _one_line(error.cause), str(error), None, _repeats(_root_cause(error))))
        else:
            problem = f"its worker was lost {RETRIES + 1} times: {_one_line(error)}"
            self._fail(StepFailed(name, problem, str(error), None))

    def _close(self, name: str) -> None:
        self.open.remove(name)
        self.ready.add(name)

    def _fail(self, failure: StepFailed) -> None:
        last = self.last_metrics.get(failure.step)
        if last is not None:
            problem = f"{failure.problem}; last metrics {last}"
            failure = StepFailed(failure.step, problem, failure.details, failure.rotten, failure.repeats)
        self.failures.append(failure)
        self.open.remove(failure.step)
        self.given_up.add(failure.step)
        self.watcher.failed(failure.step, failure.problem)
        following = self.plan.following(failure.step)
        for name in [name for name in self.open if name in following and name not in self.refs]:
            self._skip(name, failure.step)

    def _skip(self, name: str, because_of: str) -> None:
        self.open.remove(name)
        self.given_up.add(name)
        self.held.pop(name, None)
        self.watcher.skipped(name, because_of)

    def _look_at_leases(self) -> None:
        """Steps that others are at: done by them, or free to be taken."""
        if not self.held or time.monotonic() - self.leases_seen < LEASE_POLL_SECONDS:
            return
        self.leases_seen = time.monotonic()
        for name, waiter in list(self.held.items()):
            if self.store.manifest(self.plan[name].key) is not None:
                del self.held[name]
                self._close(name)
                self.watcher.taken(name)
            elif waiter.expired(self.store):
                del self.held[name]
                self.expired[name] = waiter.last

    def _look_at_cluster(self) -> None:
        """Free what lost tasks left taken, and tell whose node is missing."""
        now = time.monotonic()
        if now - self.cluster_seen < CLUSTER_POLL_SECONDS:
            return
        self.cluster_seen = now
        runtime.free_orphaned_groups()
        self._look_for_room(now)

    def _look_for_room(self, now: float) -> None:
        """Tell, once a step, that it waits for a node which is not there; an autoscaler may bring one."""
        there_is_room: dict[str, bool] = {}  # by what is asked for, since asking Ray takes a while
        for name in self.refs.keys() & self.had_room.keys():
            resources = self.plan[name].resources
            wanted = runtime.shown(resources)
            if wanted not in there_is_room:
                there_is_room[wanted] = runtime.room_for(resources) > 0
            if there_is_room[wanted]:
                self.had_room[name] = now
            elif now - self.had_room[name] > SHORTAGE_SECONDS:
                del self.had_room[name]
                self.watcher.short(name, wanted)

    def _stopped(self) -> bool:
        """Whether it was asked to stop and everything has come to rest, or had the time to."""
        if self.stopping_since is None:
            if not self.watcher.stop_wanted():
                return False
            self.stopping_since = time.monotonic()
            self.board.stop.remote()
        at_work = {self.plan[name].stage for names in self.tasks.values() for name in names}
        limit = stop_seconds(self.plan.job, at_work)
        return not self.tasks or time.monotonic() - self.stopping_since > limit
