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
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import RottenArtifact
from graftwork.pipeline.tracking import mlflow_server
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
from graftwork.pipeline.tracking.mlflow_runs import MlflowExperiment, MlflowRuns
from graftwork.pipeline.tracking.mlflow_server import one_line
from graftwork.pipeline.tracking.outbox import Gone, Refused, Unanswered

MAX_TAGS = 100  # and at most so many parameters, that MLflow takes at once
MAX_LOST_FILES = 3  # one after another, before no more are tried
LOST_SECONDS = 60.0  # that none is tried then
T = TypeVar("T")


class MlflowWriter:
    """The writer of entries to MLflow; it notes in the record which MLflow runs they are for."""

    def __init__(self, destination: Destination, record: RunRecord, store: Store) -> None:
        """Raises SpecError."""
        self.uri = destination.address  # said here, not entry by entry
        self.destination, self.store = destination, store
        self.experiment = MlflowExperiment(destination)
        self.runs = MlflowRuns(self.experiment, record)
        self.curves: dict[str, dict[str, set[int]]] = {}  # name -> metric -> its points that stand
        self.lost_files = 0  # one after another, that could not be put where MLflow keeps files
        self.lost_at = 0.0  # when the last one was tried

    @property
    def client(self) -> MlflowClient:
        return self.experiment.client

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
                self._log_metrics(self.runs.id(entry.run), self._unknown(entry))
            case Tags():
                for some in _pieces([RunTag(name, value) for name, value in entry.tags.items()], MAX_TAGS):
                    self._log_batch(self.runs.id(entry.run), tags=some)
            case File():
                self._file(self.runs.id(entry.run), entry)
            case Json():
                self._log_file(self.runs.id(entry.run), entry.name, json.dumps(entry.content, indent=2).encode())
            case End():
                run = self.runs.id(entry.run)
                self.runs.settle(entry.run)
                self.client.set_terminated(run, entry.status, end_time=entry.at)
            case LateEnd():
                found = self.runs.find(entry.run)
                if found is not None and self.client.get_run(found).info.status != "FINISHED":
                    for last in entry.ending:
                        self._take(last)

    def _begin(self, entry: Begin) -> None:
        params: Mapping[str, str] = {}
        run = self.runs.find(entry.run)
        if run is not None:
            self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
            params = self.client.get_run(run).data.params
        else:
            run = self.runs.create(entry)
            self.curves[entry.run] = {}
        missing = [Param(name, value) for name, value in entry.params.items() if name not in params]
        metrics = self._unknown(entry.values) if entry.values else []
        for some in _pieces(missing, MAX_TAGS):
            self._log_batch(run, metrics=metrics, params=some)
            metrics = []
        self._log_metrics(run, metrics)

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
            self._log_metrics(self.runs.id(run), metrics)
            for metric in metrics:
                self.curves[run].setdefault(metric.key, set()).add(metric.step)

    def _unknown(self, entry: Values) -> list[Metric]:
        """Those of the figures that MLflow does not have."""
        run, curves = self.runs.id(entry.run), self.curves.get(entry.run)
        is_new = curves is not None and not curves.keys() & entry.values.keys()
        held = {} if is_new else self.client.get_run(run).data.metrics
        if curves is not None:
            curves.update({name: {0} | curves.get(name, set()) for name in entry.values})
        return [Metric(name, value, entry.at, 0) for name, value in entry.values.items() if held.get(name) != value]

    def _curves(self, name: str) -> dict[str, set[int]]:
        """The points of each metric that stand in MLflow."""
        if name not in self.curves:
            run = self.runs.id(name)
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

    # -- errors

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
            self.experiment.check()
        except Unanswered as deleted:
            return deleted
        except Exception as error:
            fault = mlflow_server.fault(error, self.uri)
            if fault.is_ours:  # the experiment is gone: it is looked for again, and so are its runs
                self.runs.forget()
            return Unanswered(fault.reason)
        return None


def _pieces(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
