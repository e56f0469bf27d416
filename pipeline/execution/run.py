"""One run of a plan, from its lease to its results; what happens meanwhile is reported by `report`."""

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

from graftwork.pipeline.execution.report import RecordWriter, RunReport
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
from graftwork.pipeline.tracking.held_back import waiting
from graftwork.specs.reading.load import SpecError
from graftwork.specs.secrets import redacted

if TYPE_CHECKING:
    from graftwork.pipeline.tracking.tracker import Tracker

REPAIRS = 3  # times that a run recomputes what it finds damaged, before it gives up
WAIT_SECONDS = 1.0  # between looks at what another driver is doing


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
    """The course of one run of a plan: its lease, its record, Ray and MLflow, its end."""

    def __init__(self, made: Plan, view: View, begun: Callable[[], object] = lambda: None) -> None:
        """begun: called when it is certain that there will be a run, and so a store."""
        self.plan, self.view, self.stop, self.begun = made, view, Stop(), begun
        self.store = Store(made.job.store)
        self.record, self.past = self._open_record()
        self.tracker: Tracker | None = None

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
        self.writer = RecordWriter(self.store, self.record, self.view.say)
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

    def _execute(self) -> None:
        """Until nothing is left to do; what is found damaged is set aside and computed again."""
        # MLflow and Ray each take seconds to start: side by side.
        with ThreadPoolExecutor(1) as pool:
            tracking = pool.submit(self._open_tracker)
            if not self._all_cached():
                from graftwork.pipeline.execution.scheduler import session

                with session(self.plan):
                    self.stop.take_signals()
                    report = RunReport(self.plan, self.store, self.view, self.writer, tracking.result(), self.stop)
                    self._execute_in_session(report)
            tracking.result()

    def _execute_in_session(self, report: RunReport) -> None:
        from graftwork.pipeline.execution.scheduler import Execution

        for _ in range(REPAIRS + 1):
            execution = Execution(self.plan, self.store, self.record.run, self.record.git_commit, report)
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
        self.writer.save()
        if self.tracker is not None:
            self.tracker.finished(self.record)

    def _open_tracker(self) -> Tracker:
        tracker = self._make_tracker()
        tracker.opened(self.record)
        self.writer.save()
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
