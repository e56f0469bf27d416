"""Tracking: one MLflow run a job, a child a step executed. What a step learns goes there while it runs.

`distill/03.mha` is a child of `distill`, itself a child of the job. A resumed step goes on in the MLflow run that it
began, after the last point that stands there, so that no point is logged twice. The job never waits for MLflow:
everything goes through the outbox.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from graftwork.cluster.board import Point
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Artifact, Store
from graftwork.pipeline.tracking import mlflow_server
from graftwork.pipeline.tracking.destination import Destination
from graftwork.pipeline.tracking.entries import (
    ENTRY,
    AnyEntry,
    Begin,
    End,
    EndStatus,
    File,
    Json,
    LateEnd,
    Reading,
    Readings,
    Tags,
    Values,
    merged,
)
from graftwork.pipeline.tracking.outbox import Outbox
from graftwork.pipeline.tracking.writer import MlflowWriter
from graftwork.specs.fields import keyed
from graftwork.specs.problems import plain

FLUSH_SECONDS = 2.0
SHOWN = (".png", ".json", ".csv")  # artifact files that go to MLflow; tensors stay in the store
UNFIT = re.compile(r"[^\w.\- ]")  # in the name of a parameter; MLflow takes a slash for a path
MAX_NAME, MAX_VALUE = 250, 6000  # characters of a parameter
ENDS: dict[str, EndStatus] = {"finished": "FINISHED", "stopped": "KILLED"}
END_SECONDS = 30.0  # that a finished job gives MLflow to take what waits
BREAK_SECONDS = 10.0  # and one that breaks off
DELIVER_SECONDS = 600.0  # and a resume that has nothing else to do
DATABASE_SECONDS = 120.0  # at least, where a database file of ours is first made


class Tracker:
    """Tells MLflow of one run. While it lives it notes in the record which MLflow runs are the run's and its steps'."""

    def __init__(
        self,
        destination: Destination,
        record: RunRecord,
        plan: Plan,
        store: Store,
        say: Callable[[str], None],
    ) -> None:
        """Begins to deliver what an earlier start of the run left. Raises SpecError."""
        mlflow_server.set_up()
        self.plan, self.store, self.job = plan, store, record.run
        self.is_database = destination.database is not None
        if (record.mlflow_uri, record.mlflow_experiment) != (destination.recorded_uri, destination.experiment):
            record.mlflow_run = None
            for step in record.steps:
                step.mlflow_run = None
        record.mlflow_uri, record.mlflow_experiment = destination.recorded_uri, destination.experiment
        writer = MlflowWriter(destination, record, store)
        for note in destination.notes:
            say(note)
        self.outbox: Outbox[AnyEntry] = Outbox(
            store, record.run, f"MLflow at {destination.name}", ENTRY, writer.take, merged, say, record.resume_command()
        )
        self.begun = {step.name for step in record.steps if step.mlflow_run}
        self.begun |= {entry.run for entry in self.outbox.first if isinstance(entry, Begin)}
        self.under_way: set[str] = set()
        self.groups: set[str] = set()
        self.gathered: list[Reading] = []
        self.flushed = time.monotonic()

    def opened(self, record: RunRecord) -> None:
        """The job begins or goes on."""
        tags = {"graftwork.run": record.run, "mlflow.source.git.commit": record.git_commit or ""}
        job = Begin(run=self.job, parent=None, at=_now_ms(), tags=tags, params=_params(record.job))
        ours = [step for step in record.steps if step.state == "cached" and step.made_by == self.job]
        unseen = [LateEnd(run=step.name, ending=self._ending(step.name, step.key, step.seconds)) for step in ours]
        self.outbox.put(job, Json(run=self.job, name="job.json", content=record.job), *unseen)

    def started(self, step: Step) -> None:
        """A step begins or goes on."""
        tags = {"graftwork.step": step.name, "graftwork.key": step.key}
        parent, params = self._parent(step.name), _params(keyed(step.params))
        self.outbox.put(Begin(run=step.name, parent=parent, at=_now_ms(), tags=tags, params=params))
        self.begun.add(step.name)
        self.under_way.add(step.name)

    def points(self, points: list[Point]) -> None:
        """Append to the curves of the steps; gathered first, since a write costs a database more than its points."""
        now = _now_ms()
        self.gathered += [
            Reading(run=point.step, done=point.done, at=now, metrics=dict(point.metrics))
            for point in points
            if point.step in self.begun
        ]
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def ended(self, step: Step, seconds: float, artifact: Artifact) -> None:
        self._flush()
        self.under_way.discard(step.name)
        self.outbox.put(*self._ending(step.name, artifact.key, seconds))

    def failed(self, step: Step, problem: str) -> None:
        self._flush()
        self.under_way.discard(step.name)
        self.outbox.put(
            Tags(run=step.name, tags={"graftwork.error": problem[:5000]}),
            End(run=step.name, at=_now_ms(), status="FAILED"),
        )

    def finished(self, record: RunRecord) -> None:
        """The job's end: its table, each step's artifact key and the run that made it."""
        self._flush()
        now, tags = _now_ms(), {}
        for step in record.steps:
            tags[f"graftwork.key.{step.name}"] = step.key
            tags[f"graftwork.made_by.{step.name}"] = step.made_by or ""
        if record.results:
            values = {f"{row}.{name}": value for row, found in record.results.items() for name, value in found.items()}
            self.outbox.put(
                Values(run=self.job, at=now, values=values),
                Json(run=self.job, name="results.json", content=record.results),
            )
        self.outbox.put(
            Tags(run=self.job, tags=tags),
            *(End(run=group, at=now, status="FINISHED") for group in sorted(self.groups)),
            *(End(run=step, at=now, status="KILLED") for step in sorted(self.under_way)),
            End(run=self.job, at=now, status=ENDS.get(record.status, "FAILED")),
        )
        self.close(END_SECONDS if record.status == "finished" else BREAK_SECONDS)

    def close(self, seconds: float = DELIVER_SECONDS) -> None:
        """Give MLflow so long to take what waits; the store keeps the rest."""
        self._flush()
        self.outbox.close(max(seconds, DATABASE_SECONDS) if self.is_database else seconds)

    def _flush(self) -> None:
        readings, self.gathered, self.flushed = tuple(self.gathered), [], time.monotonic()
        if readings:
            self.outbox.put(Readings(readings=readings))

    def _ending(self, step: str, key: str, seconds: float) -> tuple[Values | File | End, ...]:
        """The time that a step took, the files of its artifact that people look at, and its end."""
        manifest = self.store.manifest(key)
        names = sorted(name for name in (manifest.files if manifest else ()) if "/" not in name)
        return (
            Values(run=step, at=_now_ms(), values={"seconds": seconds}),
            *(File(run=step, key=key, name=name) for name in names if name.endswith(SHOWN)),
            End(run=step, at=_now_ms(), status="FINISHED"),
        )

    def _parent(self, step: str) -> str:
        """The run that gathers steps of one stage, that of a step of this name or one made for them; or the job's."""
        group = step.rpartition("/")[0]
        if not group:
            return self.job
        if any(other.name == group for other in self.plan.steps):
            return group if group in self.begun else self.job
        if group not in self.groups:
            self.groups.add(group)
            self.outbox.put(Begin(run=group, parent=self.job, at=_now_ms()))
        return group


def _params(document: Mapping[str, Any]) -> dict[str, str]:
    """A document as MLflow's parameters, whose names hold fewer signs than those of classes and resources do."""
    return {UNFIT.sub("_", name)[:MAX_NAME]: plain(value)[:MAX_VALUE] for name, value in flattened(document)}


def flattened(values: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested document as `section.field`, value."""
    if isinstance(values, Mapping):
        return [pair for name, value in values.items() for pair in flattened(value, f"{path}.{name}" if path else name)]
    if isinstance(values, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in values):
        return [pair for number, value in enumerate(values) for pair in flattened(value, f"{path}.{number}")]
    return [(path, values if isinstance(values, str) else json.dumps(values))]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
