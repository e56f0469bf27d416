"""Tracking: one MLflow run a job, a child a step executed. What a step learns goes there while it runs.

`distill/03.mha` is a child of `distill`, itself a child of the job. A resumed step goes on in the MLflow run that it
began, after the last point that stands there, so that no point is logged twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag

from cluster.board import Point
from pipeline.planning import Plan, Step
from pipeline.record import RunRecord
from pipeline.store import Artifact
from specs.fields import keyed

FLUSH_SECONDS = 2.0
BATCH = 500  # points that MLflow takes at once, at most 1000
SHOWN = (".png", ".json", ".csv")  # artifact files that go to MLflow; tensors stay in the store


class Tracker:
    """Writes one run to MLflow."""

    def __init__(self, uri: str, experiment: str, record: RunRecord, plan: Plan, files: Path | None) -> None:
        """files: where a database of ours keeps its pictures; a server has a place of its own."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
        self.client = MlflowClient(tracking_uri=uri)
        self.plan = plan
        self.experiment = self._experiment(experiment, files)
        known = record.mlflow_run if record.mlflow_uri == uri else None
        self.parent = known or self._create(record.run, None)
        record.mlflow_uri, record.mlflow_run = uri, self.parent
        self.steps: dict[str, str] = {}  # step -> MLflow run
        if known:
            self.client.update_run(self.parent, status=RunStatus.to_string(RunStatus.RUNNING))
            self.steps = {step.name: step.mlflow_run for step in record.steps if step.mlflow_run}
        else:
            self._describe_job(record)
        self.logged: dict[str, int] = {}  # step -> last point that stands in MLflow
        self.waiting: list[Point] = []
        self.flushed = time.monotonic()

    def started(self, step: Step) -> str:
        """The MLflow run of a step, made or gone on with."""
        if step.name not in self.steps:
            group = step.name.rpartition("/")[0]
            parent = self._group(group) if group else self.parent
            run = self._create(step.name, parent)
            self.steps[step.name] = run
            self._params(run, keyed(step.params))
            self._tags(run, {"graftwork.step": step.name, "graftwork.key": step.key})
        run = self.steps[step.name]
        self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
        self.logged[step.name] = self._last_point(run)
        return run

    def points(self, points: list[Point]) -> None:
        """Append to the curves of the steps; gathered first, since a write costs a database more than its points."""
        self.waiting += points
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        points, self.waiting, self.flushed = self.waiting, [], time.monotonic()
        by_step: dict[str, list[Metric]] = {}
        for point in points:
            if point.step in self.steps and point.done > self.logged.get(point.step, -1):
                metrics = by_step.setdefault(point.step, [])
                metrics += [Metric(name, value, _now_ms(), point.done) for name, value in point.metrics.items()]
        for step, metrics in by_step.items():
            for start in range(0, len(metrics), BATCH):
                self.client.log_batch(self.steps[step], metrics=metrics[start : start + BATCH])
            self.logged[step] = max(metric.step for metric in metrics)

    def ended(self, step: Step, seconds: float, artifact: Artifact) -> None:
        self._flush()
        run = self.steps[step.name]
        self.client.log_batch(run, metrics=[Metric("seconds", seconds, _now_ms(), 0)])
        for path in sorted(artifact.path().iterdir()):
            if path.suffix in SHOWN:
                self.client.log_artifact(run, str(path))
        self.client.set_terminated(run, "FINISHED")

    def failed(self, step: Step, problem: str) -> None:
        self._flush()
        self._tags(self.steps[step.name], {"graftwork.error": problem})
        self.client.set_terminated(self.steps[step.name], "FAILED")

    def finished(self, record: RunRecord) -> None:
        """The job's end: its table, each step's artifact key and the run that made it."""
        self._flush()
        metrics = [
            Metric(f"{row}.{column}", value, _now_ms(), 0)
            for row, columns in record.results.items()
            for column, value in columns.items()
        ]
        if metrics:
            self.client.log_batch(self.parent, metrics=metrics)
            self.client.log_dict(self.parent, record.results, "results.json")
        self._tags(self.parent, {f"graftwork.key.{step.name}": step.key for step in record.steps})
        self._tags(self.parent, {f"graftwork.made_by.{step.name}": step.made_by or "" for step in record.steps})
        for group in set(self.steps) - {step.name for step in record.steps}:
            self.client.set_terminated(self.steps[group], "FINISHED")
        self.client.set_terminated(self.parent, "FINISHED" if record.status == "finished" else "FAILED")

    def _experiment(self, name: str, files: Path | None) -> str:
        known = self.client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        return self.client.create_experiment(name, artifact_location=files.as_uri() if files else None)

    def _create(self, name: str, parent: str | None) -> str:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def _group(self, name: str) -> str:
        """The run that gathers steps of one stage: that of a step of this name, or one made for them."""
        if name in {step.name for step in self.plan.steps}:
            return self.steps.get(name, self.parent)
        if name not in self.steps:
            self.steps[name] = self._create(name, self.parent)
        return self.steps[name]

    def _describe_job(self, record: RunRecord) -> None:
        self._params(self.parent, record.job)
        self._tags(self.parent, {"graftwork.run": record.run, "mlflow.source.git.commit": record.git_commit or ""})
        self.client.log_dict(self.parent, record.job, "job.json")

    def _params(self, run: str, values: Mapping[str, Any]) -> None:
        params = [Param(name, value[:6000]) for name, value in flattened(values)]
        for start in range(0, len(params), 100):
            self.client.log_batch(run, params=params[start : start + 100])

    def _tags(self, run: str, tags: Mapping[str, str]) -> None:
        entries = [RunTag(name, value) for name, value in tags.items()]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run, tags=entries[start : start + 100])

    def _last_point(self, run: str) -> int:
        names = self.client.get_run(run).data.metrics
        return max((point.step for name in names for point in self.client.get_metric_history(run, name)), default=-1)


def flattened(values: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested document as `section.field`, value."""
    if isinstance(values, Mapping):
        return [pair for name, value in values.items() for pair in flattened(value, f"{path}.{name}" if path else name)]
    if isinstance(values, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in values):
        return [pair for number, value in enumerate(values) for pair in flattened(value, f"{path}.{number}")]
    return [(path, values if isinstance(values, str) else json.dumps(values))]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
