"""Run records: what a run was asked for, how far it came and what it found. Kept in the store, read by every command.

A run's name is the job's name and a hash of its steps' keys: the same job is the same run, however often it is
started, and `graft resume` is starting it again.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from pipeline import leases
from pipeline.leases import Holder
from pipeline.planning import Plan
from pipeline.store import Store
from specs.load import SpecError

Status = Literal["running", "finished", "failed", "stopped"]
StepState = Literal["pending", "running", "cached", "done", "failed", "skipped"]
Results = dict[str, dict[str, float]]

# What a driver on a cluster is told by its environment: the submission that it is, and the commit of the project.
SUBMISSION, COMMIT = "GRAFT_SUBMISSION", "GRAFT_GIT_COMMIT"


class StepRecord(BaseModel):
    """One step of a run."""

    name: str
    key: str
    state: StepState
    seconds: float = 0.0  # of the work, whichever run did it
    made_by: str | None = None  # the run that did it
    mlflow_run: str | None = None  # its MLflow run, where this run executed it


class RunRecord(BaseModel):
    """One run of a job."""

    run: str
    name: str
    status: Status
    started: str
    job: dict[str, Any]
    steps: list[StepRecord]
    results: Results = {}
    mlflow_uri: str | None = None
    mlflow_run: str | None = None
    git_commit: str | None = None
    submissions: list[str] = []  # that started it on a cluster, by their Ray ids, the latest last
    error: str | None = None

    def step(self, name: str) -> StepRecord:
        return next(step for step in self.steps if step.name == name)

    def outcome(self) -> dict[str, Any]:
        """What `graft run --json` ends with."""
        return {
            "run": self.run,
            "status": self.status,
            "steps": [step.model_dump(include={"name", "key", "state", "seconds"}) for step in self.steps],
            "results": self.results,
        }


def run_name(plan: Plan) -> str:
    return f"{plan.job.name}-{plan.key()[:10]}"


def lease_name(run: str) -> str:
    return f"run-{run}"


def holder(store: Store, run: str) -> Holder | None:
    """Who is at the run, as far as can be told."""
    found = leases.look(store, lease_name(run))
    return None if found is None or found.holder.gone() else found.holder


def with_submission(earlier: list[str]) -> list[str]:
    """The submissions of a run, with the one that this process is, if it is one."""
    this = os.environ.get(SUBMISSION)
    return earlier if this is None or this in earlier else [*earlier, this]


def save(store: Store, record: RunRecord) -> None:
    store.write_run(record.run, record.model_dump_json(indent=1))


def find(store: Store, run: str) -> RunRecord:
    """The run of that name, the only one whose name starts so, or that of a submission; raises SpecError."""
    matches = [name for name in store.runs() if name.startswith(run)]
    matches = matches or [name for name in store.runs() if run in load(store, name).submissions]
    if run in matches:
        matches = [run]
    if len(matches) != 1:
        known = ", ".join(store.runs()) or "none yet"
        found = "several runs of that name" if matches else "no such run"
        raise SpecError([f"run: got {run!r}, {found} in {store.url}; accepted: {known}"])
    return load(store, matches[0])


def load(store: Store, run: str) -> RunRecord:
    text = store.read_run(run)
    try:
        return RunRecord.model_validate_json(text or "")
    except ValidationError:
        raise SpecError(
            [f"runs/{run}.json: cannot be read as a run's record; remove it and run the job again"]
        ) from None


def load_or_none(store: Store, run: str) -> RunRecord | None:
    return load(store, run) if run in store.runs() else None
