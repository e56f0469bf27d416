"""Execution: the steps that the store lacks become Ray tasks, chained by object refs. That is the job's DAG.

A task does one step, or a pack of steps that share work, such as the rootstock's pass in distillation. It returns a
small `StepResult` a step, never data: artifacts go through the store, and only what sites share stays with Ray. Each
step is done under its own lease; where another driver on the store has it, the task goes on and the step is tried again
when that driver is done, or gone. A lost worker is retried by Ray; an error in the work fails its step at once, the
steps that need it are skipped, and all others finish and are kept. Asked to stop, tasks save a checkpoint and end.
"""

from __future__ import annotations

import logging
import time
import traceback
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Protocol

import ray

from graftwork import stages
from graftwork.cluster import memory, runtime
from graftwork.cluster.board import Board, News, Reporter, StopSignal
from graftwork.pipeline import leases, recording
from graftwork.pipeline.estimates import parts_of_pass, site_items
from graftwork.pipeline.leases import Held, Holder, Waiter
from graftwork.pipeline.packing import pack
from graftwork.pipeline.planning import Plan, Step
from graftwork.pipeline.recording import Recordings
from graftwork.pipeline.store import Origin, RottenArtifact, Store
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import plain
from graftwork.specs.secrets import redacted
from graftwork.stages.decisions import decisions_in

POLL_SECONDS = 0.25
LEASE_POLL_SECONDS = 1.0
CLUSTER_POLL_SECONDS = 3.0
RETRIES = 3  # of a task whose worker is lost
SHORTAGE_SECONDS = 30.0  # without any node for a step, before that is told
STOP_SECONDS = 30.0  # that tasks are given to save what they have, beside the writing of a training's checkpoint
TRAININGS = {"base", "search", "finetune"}
STATES = 4  # of each parameter in a checkpoint, in fp32: the weight, its average and two moments
CHECKPOINT_BYTES_A_SECOND = 1e8  # gathered, written, hashed and put into a store over a network
# What steps import that takes long and knows nothing of Ray, in the order of need. The last two come unasked: with any
# optimizer, and with DeepSpeed's engine.
WARM = (
    "torch",
    "graftwork.stages.sources",
    "graftwork.stages.classifier",
    "graftwork.stages.pictures",
    "matplotlib.backends.backend_agg",
    "graftwork.cluster.sharded",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


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

    done: the artifact is there. held: another driver has the lease. blocked: what it needs is not there. stopped: what
    it had done is saved. failed: the work raised an error.
    """

    step: str
    key: str
    state: Literal["done", "held", "blocked", "stopped", "failed"]
    seconds: float = 0.0
    held: Held | None = None
    failure: StepFailed | None = None


class Watcher(Protocol):
    """Is told what happens while steps run."""

    def started(self, step: str) -> None: ...
    def news(self, news: News) -> None: ...
    def ended(self, step: str, result: StepResult) -> None: ...
    def failed(self, step: str, problem: str) -> None: ...
    def skipped(self, step: str, because_of: str) -> None: ...
    def waiting(self, step: str, holder: Holder) -> None: ...
    def taken(self, step: str) -> None: ...  # another driver made its artifact
    def stop_wanted(self) -> bool: ...
    def short(self, step: str, wanted: str) -> None: ...  # no node of the cluster can hold it


def session(plan: Plan) -> AbstractContextManager[None]:
    """Ray, with room for each of the plan's steps."""
    return runtime.session((step.resources for step in plan.steps), together=_widest(plan), warm=WARM)


def stop_seconds(job: JobSpec, at_work: Collection[str]) -> float:
    """Return how long tasks are given to save what they have, by the stages that are at work."""
    if TRAININGS.isdisjoint(at_work):
        return STOP_SECONDS
    model = rootstock_cost(job.model, job.place(), job.codec.latent_channels(job.data), num_classes=1)
    return STOP_SECONDS + STATES * 4 * model.params / CHECKPOINT_BYTES_A_SECOND


def _widest(plan: Plan) -> int:
    """The most workers that one step starts together."""
    searches = [layers.search.workers for layers in plan.job.learned().values()]
    return max(getattr(plan.job.weights, "workers", 1), plan.job.finetune.workers, *searches)


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
        self.held: dict[str, Waiter] = {}
        self.expired: dict[str, Held] = {}
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
        sharing: list[Step] = []
        for name in self.open:
            if name in self.refs or name in self.held:
                continue
            step = self.plan[name]
            if stages.STAGES[step.stage].shares and name not in self.alone:
                if all(needed in self.ready for needed in step.needs.values()):
                    sharing.append(step)
            elif all(needed in self.ready or needed in self.refs for needed in step.needs.values()):
                self._start([step], (), {})
        if sharing:
            self._start_sharing(sharing)

    def _start_sharing(self, sites: Sequence[Step]) -> None:
        """Sites put together for the room that there is now; before them, where it pays, the pass that all share."""
        items, shared = site_items(self.plan, [step.name for step in sites])
        resources = sites[0].resources
        slots = runtime.room_for(resources)
        parts = parts_of_pass(sites, slots)
        if parts and not recording.fits(items, parts, resources):
            parts = 0
        packs = [[self.plan[item.name] for item in one] for one in pack(items, slots, 0.0 if parts else shared)]
        waited, recorded = list[Any](), dict[str, Recordings]()
        if parts:
            asked = recording.Pass(sites, self._keys(sites[0]), self.store, StopSignal(self.board))
            waited, recorded = asked.start(parts, [Reporter(self.board, steps[0].name) for steps in packs])
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
            **runtime.options(first.resources, idle=stages.STAGES[first.stage].orchestrates),
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
            self.held[name] = Waiter(result.held)
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
    over: Held | None  # a lease that has expired
    recorded: Recordings = ()  # what tasks before left for it


def _do_steps(works: Sequence[Work], *before: Sequence[StepResult]) -> list[StepResult]:
    """Do steps one after another; an error in one does not touch the others. Ray waits for the tasks `before`."""
    done = {result.step for results in before for result in results if result.state == "done"}
    kept: dict[str, Any] = {}
    results = []
    for number, work in enumerate(works):
        together = stages.Together(
            next=[other.step.params for other in works[number + 1 :]],
            kept=kept,
            recorded=partial(recording.fetch, work.recorded) if work.recorded else None,
        )
        result = _run_step(work, done, together)
        if result.state in ("done", "failed"):
            work.report.ended(result)
        results.append(result)
    return results


_run_steps = ray.remote(_do_steps)
_run_steps_on_gpu = ray.remote(max_calls=1)(_do_steps)  # its process ends with it


def _run_step(work: Work, done: Collection[str], together: stages.Together) -> StepResult:
    """Do a step's work and commit it, under its lease."""
    step = work.step
    try:
        return _attempt(work, done, together)
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, stages.Stopped):
            return StepResult(step.name, step.key, "stopped")
        rotten = cause.key if isinstance(cause, RottenArtifact) else None
        details = redacted(traceback.format_exc())
        failure = StepFailed(step.name, _problem(work, cause), details, rotten, _repeats(cause))
        return StepResult(step.name, step.key, "failed", failure=failure)


def _attempt(work: Work, done: Collection[str], together: stages.Together) -> StepResult:
    name, key, store = work.step.name, work.step.key, work.store
    if store.manifest(key) is not None:  # another driver on this store was faster
        return StepResult(name, key, "done")
    if any(needed not in done for needed in work.awaited):
        return StepResult(name, key, "blocked")
    if work.stopping.now():
        return StepResult(name, key, "stopped")
    taken = leases.take(store, key, Holder.me(work.origin.run, work.task), over=work.over)
    if isinstance(taken, Held):
        return StepResult(name, key, "held", held=taken)
    with leases.releasing(taken):
        # It may have been committed between the first look and the lease.
        seconds = 0.0 if store.manifest(key) is not None else _do(work, together)
        return StepResult(name, key, "done", seconds=seconds)


def _do(work: Work, together: stages.Together) -> float:
    """The step's work, and its commit; returns the seconds that the work took."""
    step, store = work.step, work.store
    began = time.perf_counter()
    work.report(0, 0)
    quiet()
    context = stages.Context(
        step=step.name,
        params=step.params,
        inputs={role: store.artifact(key) for role, key in work.keys.items()},
        out=store.workplace(step.key),
        partial=store.partial(step.key),
        report=work.report,
        resources=step.resources,
        device=runtime.settle(),
        stopping=work.stopping,
        together=together,
        images=step.images,
    )
    with decisions_in(context.out, step.resources):
        stages.load(step.stage)(context)
    step.require_same_files()
    seconds = time.perf_counter() - began
    made = datetime.now(UTC).isoformat(timespec="seconds")
    origin = work.origin.model_copy(update={"seconds": seconds, "made": made})
    store.commit(step.key, context.out, dict(step.identity), origin)
    return seconds


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
    setting = stages.STAGES[stage].memory
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
