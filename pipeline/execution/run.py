"""One run of a plan, from its lease to its results: the record of it, its tracking and its view, kept in step."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from graftwork.pipeline.execution.view import View
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.pipeline.runs import record, stopping
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.runs.stopping import Stop
from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import State, Store
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.leases import Lease, LeaseOwner, LeaseSnapshot, LeaseWatch
from graftwork.pipeline.store.manifest import Manifest, RottenArtifact
from graftwork.pipeline.tracking.destination import Destination, destination
from graftwork.pipeline.tracking.outbox import waiting
from graftwork.specs.reading.load import SpecError
from graftwork.specs.secrets import redacted
from graftwork.stages.contract import NOTES

if TYPE_CHECKING:
    from graftwork.cluster.board import News
    from graftwork.pipeline.execution.task import StepResult
    from graftwork.pipeline.tracking.tracker import Tracker

REPAIRS = 3  # times that a run recomputes what it finds damaged, before it gives up
WAIT_SECONDS = 1.0  # between looks at what another driver is doing
SAVE_SECONDS = 0.25  # between copies of the record, while steps come and go


class RunFailed(Exception):
    """A run that could not finish; `record` says how far it came."""

    def __init__(self, record: RunRecord, details: str, repeats: bool = False) -> None:
        super().__init__(record.error or "")
        self.record = record
        self.details = details  # tracebacks of the failed steps
        self.repeats = repeats  # whether to resume it as it is comes to the same errors


class RunStopped(Exception):
    """A run that was asked to stop, and did; what it had done is kept."""

    def __init__(self, record: RunRecord, stop: Stop) -> None:
        super().__init__(f"{record.run}: stopped by {stop.reason}; what was done is kept")
        self.record, self.exit_code = record, stop.exit_code


class Run:
    """One run of a plan: the record of it, its tracking and its view, kept in step."""

    def __init__(self, made: Plan, view: View, begun: Callable[[], object] = lambda: None) -> None:
        """begun: called when it is certain that there will be a run, and so a store."""
        self.plan, self.view, self.stop, self.begun = made, view, Stop(), begun
        self.store = Store(made.job.store)
        self.record, self.past = self._open_record()
        self.tracker: Tracker | None = None
        self.refused = False  # whether the store refused the record
        self.changed, self.saved = False, 0.0  # since the record was last saved, and when that was

    def go(self) -> RunRecord:
        self.destination().relocate()  # the store may be a copy
        if self._served() and not waiting(self.store, self.record.run):
            return self._finish()
        if not self._is_tracked_there():  # a run that goes on does so without MLflow too: what it would tell is kept
            self.destination().check()
        if not self._all_cached():
            preflight.check_ray()
        for line in preflight.check_pending(self.plan, self.store):
            self.view.say(line)
        preflight.check_places(self.store)  # the last check: a local store is a folder from then on
        with self.stop.listening(), leases.releasing(self._lease()):
            self.record, self.past = self._open_record()  # whoever held the lease may have gone on with the run
            if self._served():
                self._deliver_kept()
                return self._finish()
            stopping.clear(self.store, self.record.run)
            return self._go()

    def _go(self) -> RunRecord:
        self.begun()
        began, self.record.expected, self.record.took = time.monotonic(), None, None
        record.save(self.store, self.record)
        self.view.open(self.plan, self.record)
        # In the background: a remote store is slow to tell what earlier steps took.
        threading.Thread(target=self._expect, args=[self.plan.states(self.store)], daemon=True).start()
        try:
            self._execute()
            self.record.took = time.monotonic() - began
            result = self._finish()
        except BaseException as error:
            self._break_off(error)
            if self.store.explain(error) is not None and not isinstance(error, RunFailed):
                raise RunFailed(self.record, traceback.format_exc()) from None
            raise
        finally:
            self.view.close()
        return result

    def _expect(self, states: Mapping[str, State]) -> None:
        """Note in the record, which is saved with each step, what the steps that are left should take."""
        from graftwork.pipeline.estimates.estimate import estimate
        from graftwork.pipeline.estimates.history import History
        from graftwork.pipeline.estimates.simulate import machine_for

        with suppress(StoreError, SpecError):
            history = History(self.store, self.store.manifests())
            undone = [step for step, state in states.items() if state != "cached"]
            self.record.expected = estimate(self.plan, undone, history, machine_for(self.plan, None))

    def _served(self) -> bool:
        """Whether there is nothing to do: all steps are in the store, and MLflow has the run."""
        if any(step.state != "cached" for step in self.record.steps):
            return False
        try:
            self._read_results()
        except RottenArtifact as rotten:
            self._set_aside(rotten.key, str(rotten))
            return False
        return self._tracked_already()

    def _lease(self) -> Lease:
        """The right to go on with this run, waited for where another driver is at it."""
        name, me = record.lease_name(self.record.run), LeaseOwner.me(self.record.run, uuid.uuid4().hex)
        expired: LeaseSnapshot | None = None
        while True:
            taken = leases.take(self.store, name, me, over=expired)
            if isinstance(taken, Lease):
                return taken
            waiter = LeaseWatch(taken)
            self.view.say(f"waiting for {taken.holder}, which is at this very run")
            while not waiter.expired(self.store):
                if self.stop.wanted(self.store, self.record.run):
                    raise RunStopped(self.record, self.stop)
                time.sleep(WAIT_SECONDS)
            expired = waiter.last

    def destination(self) -> Destination:
        """Where the figures go; raises SpecError."""
        return destination(self.plan.job.tracking, self.store, self.past)

    # -- what execution reports

    def started(self, step: str) -> None:
        assert self.tracker is not None
        self.record.step(step).state = "running"
        self.tracker.started(self.plan[step])
        self._save_soon()
        self.view.change(step, "running")

    def news(self, news: News) -> None:
        assert self.tracker is not None
        latest = {point.step: point.metrics for point in news.points}
        for step, (done, total) in news.progress.items():
            self.view.progress(step, done, total, latest.get(step, {}))
        self.tracker.points(news.points)
        if self.changed:
            self._save_soon()

    def ended(self, step: str, result: StepResult) -> None:
        assert self.tracker is not None
        if self.record.step(step).state != "running":
            self.started(step)
        self._note(step, "done", result.seconds, self.record.run)
        self.tracker.ended(self.plan[step], result.seconds, self.store.artifact(result.key))
        self.view.change(step, "done", seconds=result.seconds)
        manifest = self.store.manifest(result.key)
        if manifest is not None and NOTES in manifest.files:
            for line in json.loads(self.store.artifact(result.key).read(NOTES)):
                self.view.say(f"{step}: {line}")
        if self.plan[step].stage == "search":
            for warning in json.loads(self.store.artifact(result.key).read("search.json"))["warnings"]:
                self.view.say(f"{step}: {warning}")
        if getattr(getattr(self.plan[step].params, "data", None), "skip_broken", False):
            found = json.loads(self.store.artifact(result.key).read("broken.json"))
            if found["count"]:
                self.view.say(f"{step}: left out {found['count']} of {found['of']} images, see broken.json in it")

    def failed(self, step: str, problem: str) -> None:
        assert self.tracker is not None
        if self.record.step(step).state != "running":
            self.started(step)
        self._note(step, "failed", 0.0, None)
        self.tracker.failed(self.plan[step], problem)
        self.view.change(step, "failed", problem)

    def skipped(self, step: str, because_of: str) -> None:
        self._note(step, "skipped", 0.0, None)
        self.view.change(step, "skipped", f"needs {because_of}")

    def waiting(self, step: str, holder: LeaseOwner) -> None:
        self.view.say(f"{step}: waiting for {holder}, which is at it")

    def made_elsewhere(self, step: str) -> None:
        manifest = self.store.manifest(self.plan[step].key)
        assert manifest is not None
        self._note(step, "cached", manifest.origin.seconds, manifest.origin.run)
        self.view.change(step, "cached", f"by {manifest.origin.run}")

    def short(self, step: str, wanted: str) -> None:
        self.view.say(f"{step}: waiting for a node with {wanted}; the cluster has none")

    def stop_wanted(self) -> bool:
        wanted = self.stop.wanted(self.store, self.record.run)
        if wanted:
            self.view.say(f"{self.stop.reason}: stopping; steps save what they have. Ctrl-C stops at once")
        return wanted

    # -- the run's course

    def _execute(self) -> None:
        """Until nothing is left to do; what is found damaged is set aside and computed again."""
        # MLflow and Ray each take seconds to start: side by side.
        with ThreadPoolExecutor(1) as pool:
            tracking = pool.submit(self._open_tracker)
            if not self._all_cached():
                from graftwork.pipeline.execution.scheduler import session

                with session(self.plan):
                    self.stop.take_signals()
                    tracking.result()
                    self._execute_in_session()
            tracking.result()

    def _execute_in_session(self) -> None:
        from graftwork.pipeline.execution.scheduler import Execution

        for _ in range(REPAIRS + 1):
            execution = Execution(self.plan, self.store, self.record.run, self.record.git_commit, self)
            failures = execution.go()
            damaged = {failure.rotten: failure.problem for failure in failures if failure.rotten}
            if not failures and execution.open:
                raise RunStopped(self.record, self.stop)
            if not failures:
                return
            if any(not failure.rotten for failure in failures):
                break
            for key, problem in damaged.items():
                self._set_aside(key, problem)
        self._fail(failures)

    def _fail(self, failures: Sequence[Any]) -> None:
        self.record.error = redacted("\n".join(str(failure) for failure in failures))
        details = "\n".join(failure.details for failure in failures)
        raise RunFailed(self.record, details, all(failure.repeats for failure in failures))

    def _finish(self) -> RunRecord:
        """Write the end of the run into its record, to MLflow and to the view."""
        self._read_results()
        self.record.status, self.record.error = "finished", None
        if self.tracker is not None:
            self.tracker.finished(self.record)
        if self.record != self.past:
            record.save(self.store, self.record)
        return self.record

    def _read_results(self) -> None:
        """The table, from a verified file."""
        self.record.results = json.loads(self.store.artifact(self.plan["evaluate"].key).read("results.json"))

    def _break_off(self, error: BaseException) -> None:
        told = self.store.explain(error)
        if isinstance(error, RunStopped):
            self.record.status, self.record.error = "stopped", str(error)
        else:
            self.record.status = "failed"
            self.record.error = self.record.error or redacted(str(told or f"{type(error).__name__}: {error}")).strip()
        for step in self.record.steps:
            if step.state == "running":
                step.state = "pending"
        self._save()
        if self.tracker is not None:
            self.tracker.finished(self.record)

    def _open_tracker(self) -> Tracker:
        tracker = self._make_tracker()
        tracker.opened(self.record)
        self._save()
        self.tracker = tracker  # so that it hears of a run that ends while Ray starts
        return tracker

    def _make_tracker(self) -> Tracker:
        from graftwork.pipeline.tracking.tracker import Tracker

        return Tracker(self.destination(), self.record, self.plan, self.store, self.view.say)

    def _deliver_kept(self) -> None:
        """What MLflow did not take when the run finished."""
        if waiting(self.store, self.record.run):
            self._make_tracker().close()

    def _open_record(self) -> tuple[RunRecord, RunRecord | None]:
        """This run's record, going on from the one that an earlier start of it left."""
        name = record.run_name(self.plan)
        past = record.load_or_none(self.store, name)
        before = {step.name: step for step in past.steps} if past else {}
        made = self.store.known([step.key for step in self.plan.steps])
        steps = [_open_step(step, made.get(step.key), before.get(step.name)) for step in self.plan.steps]
        opened = RunRecord(
            run=name,
            name=self.plan.job.name,
            status="running",
            started=past.started if past else datetime.now(UTC).isoformat(timespec="seconds"),
            job=self.plan.job.model_dump(mode="json"),
            steps=steps,
            mlflow_uri=past.mlflow_uri if past else None,
            mlflow_experiment=past.mlflow_experiment if past else None,
            mlflow_run=past.mlflow_run if past else None,
            git_commit=past.git_commit if past else git_commit(),
            submissions=record.with_submission(past.submissions if past else []),
            expected=past.expected if past else None,
            took=past.took if past else None,
        )
        return opened, past

    def _all_cached(self) -> bool:
        return all(state == "cached" for state in self.plan.states(self.store).values())

    def _tracked_already(self) -> bool:
        return self.past is not None and self.past.status == "finished" and self._is_tracked_there()

    def _is_tracked_there(self) -> bool:
        """Whether an earlier start of the run told the same server or database."""
        there = self.destination()
        return self.past is not None and (self.past.mlflow_uri, self.past.mlflow_experiment) == (
            there.recorded_uri,
            there.experiment,
        )

    def _note(self, step: str, state: record.StepState, seconds: float, made_by: str | None) -> None:
        entry = self.record.step(step)
        entry.state, entry.seconds, entry.made_by = state, seconds, made_by
        self._save_soon()

    def _save_soon(self) -> None:
        """Keep the record in the store now, or, where that was done a moment ago, with what else comes by then."""
        self.changed = True
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        """Keep the record in the store; where that cannot be, say so once: the run itself tells what came of it."""
        self.changed, self.saved = False, time.monotonic()
        try:
            record.save(self.store, self.record)
        except StoreError as error:
            if not self.refused:
                self.view.say(f"the record of this run is not kept: {error}")
            self.refused = True
        else:
            self.refused = False

    def _set_aside(self, key: str, problem: str) -> None:
        aside = self.store.quarantine(key)
        self.view.say(f"damaged: {problem}; set aside in {aside} and computed again")


def _open_step(step: Step, made: Manifest | None, past: StepRecord | None) -> StepRecord:
    """A step as a run finds it. made: its artifact's manifest, if there is one."""
    mlflow_run = past.mlflow_run if past else None
    if made is None:
        return StepRecord(name=step.name, key=step.key, state="pending", mlflow_run=mlflow_run)
    return StepRecord(
        name=step.name,
        key=step.key,
        state="cached",
        seconds=made.origin.seconds,
        made_by=made.origin.run,
        mlflow_run=mlflow_run,
    )


def git_commit() -> str | None:
    """The commit of the folder that the job is started, or was sent, from, if it is a git checkout."""
    if record.COMMIT in os.environ:
        return os.environ[record.COMMIT]
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
