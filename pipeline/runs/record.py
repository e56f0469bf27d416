"""Run records: what a run was asked for, how far it came and what it found. Kept in the store, read by every command.

A run's name is the job's name and a hash of its steps' keys: the same job is the same run, however often it is
started, and `graft resume` is starting it again.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints

from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import LeaseOwner
from graftwork.specs.problems import SpecError, first_few, shown
from graftwork.specs.store import DEFAULT_STORE

if TYPE_CHECKING:
    from pandas import DataFrame

Status = Literal["running", "finished", "failed", "stopped", "lost"]  # lost: its driver died
StepState = Literal["pending", "running", "cached", "done", "failed", "skipped"]


# A record may come from anybody who can write to the store, and is printed: it names nothing outside it, and has no
# control characters.
Word = Annotated[str, StringConstraints(pattern=r"^[\w.:+/ -]*$", max_length=200)]
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Results = dict[Word, dict[Word, float]]
SHOWN = 20  # runs that an error names at most

# What a driver on a cluster is told by its environment: the submission that it is, and the commit of the project.
SUBMISSION, COMMIT = "GRAFT_SUBMISSION", "GRAFT_GIT_COMMIT"


class StepRecord(BaseModel):
    """One step of a run."""

    name: Word
    key: Key
    state: StepState
    seconds: float = 0.0  # of the work, whichever run did it
    made_by: Word | None = None  # the run that did it
    mlflow_run: Word | None = None  # its MLflow run, where this run executed it


class Expected(BaseModel):
    """What was left of a run should take, when it began (pipeline.estimates)."""

    seconds: float  # wall time
    gpu_hours: float
    cpus: float  # of the machine that is meant
    gpus: float
    shares: dict[Word, float] = {}  # of the machine's time, by stage
    assumption: Word = ""  # of the speed of steps of which no run has done the like
    assumed: list[Word] = []  # those steps
    unknown: list[Word] = []  # steps that count as nothing: there was no basis at all


class RunRecord(BaseModel):
    """One run of a job."""

    run: RunName
    name: Word
    status: Status
    started: Word
    job: dict[str, Any]
    steps: list[StepRecord]
    results: Results = {}
    mlflow_uri: str | None = None  # where its figures go, see pipeline.tracking.destination
    mlflow_experiment: str | None = None
    mlflow_run: Word | None = None
    git_commit: Word | None = None
    submissions: list[Word] = []  # that started it on a cluster, by their Ray ids, the latest last
    error: str | None = None
    expected: Expected | None = None
    took: float | None = None  # seconds, of what was expected to take so long

    def step(self, name: str) -> StepRecord:
        return next(step for step in self.steps if step.name == name)

    def frame(self) -> DataFrame:
        """Return the results as a pandas DataFrame: a row a model, a column a figure."""
        import pandas

        return pandas.DataFrame.from_dict(self.results, orient="index")

    def resume_command(self) -> str:
        """What a user types to go on with it."""
        store = self.job["store"]
        return f"graft resume {self.run}" + ("" if store == DEFAULT_STORE else f" --store {shlex.quote(store)}")

    def estimated(self) -> dict[str, Any] | None:
        """What it was expected to take, and took, in seconds; None where that was not kept."""
        if self.expected is None or self.took is None or self.expected.seconds <= 0:
            return None
        seconds = self.expected.seconds
        return {"run": self.run, "expected": seconds, "took": self.took, "off": self.took / seconds - 1}

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


def holder(store: Store, run: str) -> LeaseOwner | None:
    """Who is at the run, as far as can be told."""
    found = leases.look(store, lease_name(run))
    return None if found is None or found.holder.gone() else found.holder


def as_it_is(store: Store, record: RunRecord) -> RunRecord:
    """The record, but for what a driver that died could not write any more."""
    if record.status != "running" or holder(store, record.run) is not None:
        return record
    steps = [step.model_copy(update={"state": "pending"} if step.state == "running" else {}) for step in record.steps]
    return record.model_copy(update={"status": "lost", "steps": steps})


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
        runs = store.runs()
        known = first_few(runs, SHOWN)
        found = "several runs of that name" if matches else "no such run"
        raise SpecError([f"run: got {shown(run)}, {found} in {store.url}; accepted: {known or 'none yet'}"])
    return load(store, matches[0])


def load(store: Store, run: str) -> RunRecord:
    text = store.read_run(run)
    try:
        found = RunRecord.model_validate_json(text or "")
        if found.run != run:
            raise ValueError(found.run)
        return found
    except ValueError:
        raise SpecError(
            [f"runs/{run}.json: cannot be read as a run's record; remove it and run the job again"]
        ) from None


def load_or_none(store: Store, run: str) -> RunRecord | None:
    return load(store, run) if run in store.runs() else None
