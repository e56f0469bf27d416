"""What happens in a run, told to its record, to MLflow and to its view, so that the three say the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from graftwork.pipeline.execution.view import View
from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.runs.stopping import Stop
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.leases import LeaseOwner
from graftwork.stages.contract import NOTES

if TYPE_CHECKING:
    from graftwork.cluster.board import News
    from graftwork.pipeline.execution.task import StepResult
    from graftwork.pipeline.tracking.tracker import Tracker

SAVE_SECONDS = 0.25  # between copies of the record, while steps come and go


class RecordWriter:
    """Saves a run's record in the store as steps come and go."""

    def __init__(self, store: Store, run: RunRecord, say: Callable[[str], None]) -> None:
        self.store, self.record, self.say = store, run, say
        self.refused = False  # whether the store refused the record
        self.changed, self.saved = False, 0.0  # since the record was last saved, and when that was

    def set_state(self, step: str, state: record.StepState, seconds: float = 0.0, made_by: str | None = None) -> None:
        entry = self.record.step(step)
        entry.state, entry.seconds, entry.made_by = state, seconds, made_by
        self.save_soon()

    def save_soon(self) -> None:
        """Save the record now or, if it was saved a moment ago, with what else comes by then."""
        self.changed = True
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save_changes(self) -> None:
        """Save what `save_soon` put off, if it is time."""
        if self.changed:
            self.save_soon()

    def save(self) -> None:
        """Save the record. If the store refuses it, say so once: the run goes on, and tells itself what came of it."""
        self.changed, self.saved = False, time.monotonic()
        try:
            record.save(self.store, self.record)
        except StoreError as error:
            if not self.refused:
                self.say(f"the record of this run is not kept: {error}")
            self.refused = True
        else:
            self.refused = False


class RunReport:
    """The scheduler's `Watcher`."""

    def __init__(
        self, plan: Plan, store: Store, view: View, writer: RecordWriter, tracker: Tracker, stop: Stop
    ) -> None:
        self.plan, self.store, self.view, self.writer, self.tracker, self.stop = (
            plan,
            store,
            view,
            writer,
            tracker,
            stop,
        )
        self.record = writer.record

    def started(self, step: str) -> None:
        self.record.step(step).state = "running"
        self.tracker.started(self.plan[step])
        self.writer.save_soon()
        self.view.change(step, "running")

    def news(self, news: News) -> None:
        latest = {point.step: point.metrics for point in news.points}
        for step, (done, total) in news.progress.items():
            self.view.progress(step, done, total, latest.get(step, {}))
        self.tracker.points(news.points)
        self.writer.save_changes()

    def ended(self, step: str, result: StepResult) -> None:
        self._require_started(step)
        self.writer.set_state(step, "done", result.seconds, self.record.run)
        self.tracker.ended(self.plan[step], result.seconds, self.store.artifact(result.key))
        self.view.change(step, "done", seconds=result.seconds)
        manifest = self.store.manifest(result.key)
        if manifest is not None and NOTES in manifest.files:
            for line in json.loads(self.store.artifact(result.key).read(NOTES)):
                self.view.say(f"{step}: {line}")

    def failed(self, step: str, problem: str) -> None:
        self._require_started(step)
        self.writer.set_state(step, "failed")
        self.tracker.failed(self.plan[step], problem)
        self.view.change(step, "failed", problem)

    def skipped(self, step: str, because_of: str) -> None:
        self.writer.set_state(step, "skipped")
        self.view.change(step, "skipped", f"needs {because_of}")

    def waiting(self, step: str, holder: LeaseOwner) -> None:
        self.view.say(f"{step}: waiting for {holder}, which is at it")

    def made_elsewhere(self, step: str) -> None:
        manifest = self.store.manifest(self.plan[step].key)
        assert manifest is not None
        self.writer.set_state(step, "cached", manifest.origin.seconds, manifest.origin.run)
        self.view.change(step, "cached", f"by {manifest.origin.run}")

    def short(self, step: str, wanted: str) -> None:
        self.view.say(f"{step}: waiting for a node with {wanted}; the cluster has none")

    def stop_wanted(self) -> bool:
        wanted = self.stop.wanted(self.store, self.record.run)
        if wanted:
            self.view.say(f"{self.stop.reason}: stopping; steps save what they have. Ctrl-C stops at once")
        return wanted

    def _require_started(self, step: str) -> None:
        """A step may end before any news of it came."""
        if self.record.step(step).state != "running":
            self.started(step)
