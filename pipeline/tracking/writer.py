"""What a run tells MLflow, as entries that can wait and be delivered twice, and the writer that takes them there.

Why an entry may be delivered twice, after an answer that was lost:

    entry           why twice is harmless
    Begin           the run is looked for by its `graftwork.id` before one is made, and parameters that stand are left
                    alone; a run that an unanswered request made after all is deleted at the End
    Values          figures that stand are left alone: `_unknown`
    Readings        of a curve only what comes after its last point is written: `_curves`
    Tags            a tag is overwritten by the same value
    File, Json      a file is overwritten by the same content
    End             a run's state and end are overwritten by the same; the time is that of what happened
    LateEnd         nothing is done if the run is FINISHED
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import RottenArtifact
from graftwork.pipeline.tracking import mlflow_database, mlflow_server
from graftwork.pipeline.tracking.destination import Destination
from graftwork.pipeline.tracking.entries import (
    MAX_METRICS,
    AnyEntry,
    Begin,
    End,
    File,
    Json,
    LateEnd,
    Readings,
    Tags,
    Values,
)
from graftwork.pipeline.tracking.mlflow_database import restoring
from graftwork.pipeline.tracking.mlflow_server import find_experiment, one_line
from graftwork.pipeline.tracking.outbox import Gone, Refused, Unanswered

MAX_TAGS = 100  # and at most so many parameters, that MLflow takes at once
MAX_LOST_FILES = 3  # one after another, before no more are tried
LOST_SECONDS = 60.0  # that none is tried then
ID = "graftwork.id"  # the tag by which a run is found whose creation was not answered
T = TypeVar("T")


class MlflowWriter:
    """The writer of entries to MLflow; it notes in the record which MLflow runs they are for."""

    def __init__(self, destination: Destination, record: RunRecord, store: Store) -> None:
        """Raises SpecError."""
        self.uri = destination.address  # said here, not entry by entry
        self.destination, self.record, self.store = destination, record, store
        self.ids: dict[str, str] = {}  # name -> MLflow run, seen to be there
        self.curves: dict[str, dict[str, set[int]]] = {}  # name -> metric -> its points that stand
        self.doubtful: set[str] = set()  # names under which an unanswered request may yet make another run
        self.lost_files = 0  # one after another, that could not be put where MLflow keeps files
        self.lost_at = 0.0  # when the last one was tried

    def take(self, entry: AnyEntry) -> None:
        """Deliver an entry, for the first time or again; raises Unanswered, Refused or Gone."""
        try:
            self._take(entry)
        except (Unanswered, Refused, Gone):
            raise
        except Exception as error:
            self.curves.clear()  # what was written before the error is for MLflow to say
            raise self._verdict(entry, error) from error

    def _take(self, entry: AnyEntry) -> None:
        match entry:
            case Begin():
                self._begin(entry)
            case Readings():
                self._readings(entry)
            case Values():
                self._log_metrics(self._id(entry.run), self._unknown(entry))
            case Tags():
                for some in _pieces([RunTag(name, value) for name, value in entry.tags.items()], MAX_TAGS):
                    self._log_batch(self._id(entry.run), tags=some)
            case File():
                self._file(self._id(entry.run), entry)
            case Json():
                self._log_file(self._id(entry.run), entry.name, json.dumps(entry.content, indent=2).encode())
            case End():
                run = self._id(entry.run)
                if entry.run in self.doubtful:
                    self._delete_others(self._search(entry.run), run)
                self.client.set_terminated(run, entry.status, end_time=entry.at)
            case LateEnd():
                found = self._find(entry.run)
                if found is not None and self.client.get_run(found).info.status != "FINISHED":
                    for last in entry.ending:
                        self._take(last)

    def _begin(self, entry: Begin) -> None:
        params: Mapping[str, str] = {}
        if self._find(entry.run):
            run = self.ids[entry.run]
            self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
            params = self.client.get_run(run).data.params
        else:
            run = self._create(entry)
        missing = [Param(name, value) for name, value in entry.params.items() if name not in params]
        metrics = self._unknown(entry.values) if entry.values else []
        for some in _pieces(missing, MAX_TAGS):
            self._log_batch(run, metrics=metrics, params=some)
            metrics = []
        self._log_metrics(run, metrics)

    def _create(self, entry: Begin) -> str:
        tags = entry.tags | {ID: self._tag(entry.run)}
        if entry.parent is not None and (parent := self._find(entry.parent)):
            tags["mlflow.parentRunId"] = parent
        try:
            made = self.client.create_run(self.experiment, start_time=entry.at, tags=tags, run_name=entry.run)
        except Exception:
            self.doubtful.add(entry.run)
            raise
        self.curves[entry.run] = {}
        return self._note(entry.run, made.info.run_id)

    def _file(self, run: str, entry: File) -> None:
        # Each may take as long as a server that is away.
        if self.lost_files >= MAX_LOST_FILES and time.monotonic() - self.lost_at < LOST_SECONDS:
            raise Refused(f"takes no files; {entry.name} of {entry.run} was not tried")
        try:
            content = self.store.artifact(entry.key).read(entry.name)
        except (FileNotFoundError, RottenArtifact) as gone:
            raise Gone(f"{entry.name} of {entry.run}, which is not in the store any more ({one_line(gone)})") from None
        self._log_file(run, entry.name, content)
        self.lost_files = 0

    def _log_file(self, run: str, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            if self.destination.database is None:
                self.client.log_artifact(run, str(path))
            else:  # MLflow's client remembers a run's place for the whole process, whatever database was copied since
                get_artifact_repository(self.client.get_run(run).info.artifact_uri).log_artifact(str(path))

    def _readings(self, entry: Readings) -> None:
        by_run: dict[str, list[Metric]] = {}
        for reading in entry.readings:
            curves = self._curves(reading.run)
            by_run.setdefault(reading.run, []).extend(
                Metric(name, value, reading.at, reading.done)
                for name, value in reading.metrics.items()
                if reading.done not in curves.get(name, ())
            )
        for run, metrics in by_run.items():
            self._log_metrics(self._id(run), metrics)
            for metric in metrics:
                self.curves[run].setdefault(metric.key, set()).add(metric.step)

    def _unknown(self, entry: Values) -> list[Metric]:
        """Those of the figures that MLflow does not have."""
        run, curves = self._id(entry.run), self.curves.get(entry.run)
        is_new = curves is not None and not curves.keys() & entry.values.keys()
        held = {} if is_new else self.client.get_run(run).data.metrics
        if curves is not None:
            curves.update({name: {0} | curves.get(name, set()) for name in entry.values})
        return [Metric(name, value, entry.at, 0) for name, value in entry.values.items() if held.get(name) != value]

    def _curves(self, name: str) -> dict[str, set[int]]:
        """The points of each metric that stand in MLflow."""
        if name not in self.curves:
            run = self._id(name)
            self.curves[name] = {
                metric: {point.step for point in self.client.get_metric_history(run, metric)}
                for metric in self.client.get_run(run).data.metrics
            }
        return self.curves[name]

    def _log_metrics(self, run: str, metrics: Sequence[Metric]) -> None:
        for some in _pieces(metrics, MAX_METRICS):
            self._log_batch(run, metrics=some)

    def _log_batch(
        self, run: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        """Whatever MLFLOW_ENABLE_ASYNC_LOGGING says: in the background an error would be told to nobody."""
        self.client.log_batch(run, metrics=metrics, params=params, tags=tags, synchronous=True)

    # -- which MLflow run

    def _id(self, name: str) -> str:
        found = self._find(name)
        if found is None:
            raise Refused(f"has no run of {name}")
        return found

    def _find(self, name: str) -> str | None:
        """The MLflow run of a name: noted in the record, or found by its tag; None where there is none."""
        if name in self.ids:
            return self.ids[name]
        noted = self._noted(name)
        if noted is not None and self._is_active(noted):
            return self._note(name, noted)
        left = self._search(name) if name in self.doubtful else self._left.get(name, [])
        found = sorted(left, key=lambda run: (-len(run.data.metrics), run.info.run_id))
        if not found:
            return None
        self._delete_others(found, found[0].info.run_id)
        return self._note(name, found[0].info.run_id)

    @cached_property
    def _left(self) -> dict[str, list[Run]]:
        """What earlier starts of the run left, by name: asked for once, as most runs of a job are new."""
        prefix, token, found = self._tag(""), None, dict[str, list[Run]]()
        while True:
            page = self.client.search_runs([self.experiment], f"tags.`{ID}` LIKE '{prefix}%'", page_token=token)
            for run in page:
                if (tag := run.data.tags[ID]).startswith(prefix):  # LIKE has _ for any character
                    found.setdefault(tag.removeprefix(prefix), []).append(run)
            if not (token := page.token):
                return found

    def _search(self, name: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment], f"tags.`{ID}` = '{self._tag(name)}'"))

    def _delete_others(self, runs: Sequence[Run], ours: str) -> None:
        """An unanswered request to make a run may be carried out after all, beside the one that was repeated."""
        for run in runs:
            if run.info.run_id != ours:
                self.client.delete_run(run.info.run_id)

    def _tag(self, name: str) -> str:
        """The same job in another store is another run."""
        return f"{self.record.run}/{self.record.started}/{name}"

    def _noted(self, name: str) -> str | None:
        if name == self.record.run:
            return self.record.mlflow_run
        return next((step.mlflow_run for step in self.record.steps if step.name == name), None)

    def _note(self, name: str, run: str) -> str:
        self.ids[name] = run
        if name == self.record.run:
            self.record.mlflow_run = run
        for step in self.record.steps:
            if step.name == name:
                step.mlflow_run = run
        return run

    def _is_active(self, run: str) -> bool:
        try:
            return bool(self.client.get_run(run).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    # -- the server

    @cached_property
    def client(self) -> MlflowClient:
        if self.destination.database is not None:
            mlflow_database.make(self.destination.database)
            mlflow_database.relocate(self.destination.database)
        return MlflowClient(tracking_uri=self.uri)

    @cached_property
    def experiment(self) -> str:
        """The experiment's id; made if there is none. Raises Unanswered if it is deleted."""
        name, database = self.destination.experiment, self.destination.database
        known = find_experiment(self.client, name)
        if known is None:
            place = mlflow_database.pictures_place(database) if database else None
            try:
                return str(self.client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                    raise
            known = find_experiment(self.client, name)
        if known is None:
            raise Unanswered(f"has lost the experiment {name!r}")
        self._check_active(known)
        return str(known.experiment_id)

    def _check_active(self, known: Experiment) -> None:
        if known.lifecycle_stage == "deleted":
            remedy = restoring(self.destination.name, known.experiment_id)
            raise Unanswered(f"has the experiment {known.name!r} as deleted; {remedy}")

    def _verdict(self, entry: AnyEntry, error: Exception) -> Unanswered | Refused:
        """Whether the server can take nothing now, or alone this entry."""
        fault = mlflow_server.fault(error, self.uri)
        if isinstance(entry, File | Json | LateEnd):
            self.lost_files, self.lost_at = self.lost_files + 1, time.monotonic()
            file = f"of {entry.run}" if isinstance(entry, LateEnd) else entry.name
            return self._trouble() or Refused(f"takes no file {file} ({one_line(error)})")
        if fault.is_ours:
            return self._trouble() or Refused(fault.reason)
        alone = not fault.is_silence and self.destination.database is None and self._trouble() is None
        return Unanswered(fault.reason, others=alone)

    def _trouble(self) -> Unanswered | None:
        """What keeps the server from taking anything; None if it answers to a small request."""
        try:
            self._check_active(self.client.get_experiment(self.experiment))
        except Unanswered as deleted:
            return deleted
        except Exception as error:
            fault = mlflow_server.fault(error, self.uri)
            if fault.is_ours:  # the experiment is gone: it is looked for again, and so are its runs
                for found in ("experiment", "_left"):
                    self.__dict__.pop(found, None)
                self.ids.clear()
            return Unanswered(fault.reason)
        return None


def _pieces(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
