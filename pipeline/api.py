"""Graftwork from Python: `plan`, `run`, `resume`, `compare`. The command line is a thin layer over these.

Nothing heavy is imported until a step has to run: a run whose steps are all cached starts neither Ray nor torch.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import planning, preflight, record
from pipeline.planning import Plan
from pipeline.record import RunRecord, StepRecord
from pipeline.store import RottenArtifact, Store
from pipeline.view import SilentView, View
from specs.costs import GraftCost
from specs.data import ImageFolderData
from specs.hub import is_hub_id
from specs.job import JobSpec
from specs.load import SpecError, job_from, load
from specs.model import Layout
from specs.problems import shown
from specs.secrets import redacted
from stages.sources import class_sizes

if TYPE_CHECKING:
    from cluster.board import News
    from pipeline.execute import StepResult
    from pipeline.track import Tracker

MODEL_STAGES = ("base", "finetune")  # whose artifacts are model folders
REPAIRS = 3  # times that a run recomputes what it finds damaged, before it gives up


class RunFailed(Exception):
    """A run that could not finish; `record` says how far it came."""

    def __init__(self, record: RunRecord, details: str) -> None:
        super().__init__(record.error or "")
        self.record = record
        self.details = details  # tracebacks of the failed steps


def plan(job: JobSpec | str | Path, overrides: Iterable[str] = ()) -> Plan:
    """What a job comes to, step by step; raises SpecError where it cannot be done.

    Files that the job names may lie elsewhere: `preflight.absent` lists them, and the keys are not those of a run.
    """
    spec = job if isinstance(job, JobSpec) else load(job, overrides)
    shortages = preflight.shortages(spec)
    if shortages:
        raise SpecError(shortages)
    return planning.make_plan(spec)


def costs(job: JobSpec) -> GraftCost | None:
    """What the graft costs beside its rootstock; None where a search under a budget will settle it, or where the
    number of classes is in data that are elsewhere."""
    if job.budget() is not None:
        return None
    here = not isinstance(job.data, ImageFolderData) or Path(job.data.path).is_dir()
    num_classes = job.data.classes or (len(class_sizes(job.data)) if here else 0)
    return planning.costs(job, num_classes) if num_classes else None


def run(job: JobSpec | str | Path, overrides: Iterable[str] = (), view: View | None = None) -> RunRecord:
    """Do what is not in the store yet and return the run; raises SpecError before, RunFailed after it has begun."""
    spec = job if isinstance(job, JobSpec) else load(job, overrides)
    preflight.fetch(spec)
    preflight.check(spec)
    return Run(planning.make_plan(spec), view or SilentView()).go()


def resume(name: str, store: str = ".graftwork", view: View | None = None) -> RunRecord:
    """Go on with a run: the steps in the store are not repeated, training goes on from its last checkpoint."""
    past = record.find(Store(store), name)
    return run(job_from({**past.job, "store": store}), view=view)


def compare(runs: Sequence[str], store: str = ".graftwork") -> list[dict[str, Any]]:
    """One flat row a run: its name, status, and `row.column` as in MLflow."""
    found = [record.find(Store(store), name) for name in runs]
    return [
        {"run": one.run, "name": one.name, "status": one.status}
        | {f"{row}.{column}": value for row, columns in one.results.items() for column, value in columns.items()}
        for one in found
    ]


def export(
    name: str, out: str | Path, layout: Layout = "graftwork", store: str = ".graftwork", vae: str | None = None
) -> Path:
    """Write a model of a run for other tools, with a model card; raises SpecError where that cannot be.

    name: RUN, for the finetuned graft, or RUN/STEP for another step that leaves a model.
    """
    from models.checkpoints import Card, ExportRefused, UnfitCheckpoint, export

    run_name, _, step = name.partition("/")
    place = Store(store)
    found = record.find(place, run_name)
    models = [one.name for one in found.steps if one.name.split("/")[0] in MODEL_STAGES]
    if (step or "finetune") not in models:
        raise SpecError(
            [f"export: got {shown(name)}; accepted: {', '.join(f'{found.run}/{model}' for model in models)}"]
        )
    artifact = found.step(step or "finetune")
    if place.manifest(artifact.key) is None:
        raise SpecError(
            [f"export: {found.run}/{artifact.name} is not in the store; go on with: graft resume {found.run}"]
        )
    job = found.job
    card = Card(
        title=found.run,
        rootstock=f"`{json.dumps(job['model'])}`, {_origin(job['weights'])}.",
        recipe={section: job[section] for section in ("seed", "data", "graft", "distill", "finetune", "evaluate")},
        results=found.results,
        keys={one.name: one.key for one in found.steps},
    )
    try:
        export(place.artifact(artifact.key).path(), Path(out), layout, card=card, vae=vae)
    except (ExportRefused, UnfitCheckpoint) as refused:
        raise SpecError([f"export: {refused}"]) from None
    return Path(out)


def _origin(weights: dict[str, Any]) -> str:
    """Where a rootstock's weights come from, without the folders of this machine."""
    if weights["kind"] == "pretrain":
        return f"pretrained in the job, {weights['steps']} steps of {weights['batch']}"
    return f"read from `{weights['path'] if is_hub_id(weights['path']) else Path(weights['path']).name}`"


class Run:
    """One run of a plan: the record of it, its tracking and its view, kept in step."""

    def __init__(self, made: Plan, view: View) -> None:
        self.plan, self.view = made, view
        self.store = Store(made.job.store)
        self.record, self.past = self._open_record()
        self.tracker: Tracker | None = None

    def go(self) -> RunRecord:
        if self._all_cached():
            try:
                self._read_results()
            except RottenArtifact as rotten:
                self._set_aside(rotten.key, str(rotten))
            else:
                if self._tracked_already():
                    return self._finish()
        preflight.check_places(self.plan.job, self.store, self.tracking_uri())
        if self._reads_files():
            pending = [step for step, state in self.plan.states(self.store).items() if state != "cached"]
            preflight.check_files(self.plan.job, pending)
        record.save(self.store, self.record)
        self.view.open(self.plan, self.record)
        try:
            self._execute()
            result = self._finish()
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            self.view.close()
        return result

    def tracking_uri(self) -> str:
        if self.plan.job.tracking.uri is not None:
            return self.plan.job.tracking.uri
        if not self.store.local:
            raise SpecError(
                ["tracking.uri: got nothing; accepted: an MLflow server, needed when the store is not a folder"]
            )
        return f"sqlite:///{self.store.root}/mlflow.db"

    # -- what execution reports

    def started(self, step: str) -> None:
        assert self.tracker is not None
        self.record.step(step).state = "running"
        self.record.step(step).mlflow_run = self.tracker.started(self.plan[step])
        record.save(self.store, self.record)
        self.view.change(step, "running")

    def news(self, news: News) -> None:
        assert self.tracker is not None
        latest = {point.step: point.metrics for point in news.points}
        for step, (done, total) in news.progress.items():
            self.view.progress(step, done, total, latest.get(step, {}))
        self.tracker.points(news.points)

    def ended(self, step: str, result: StepResult) -> None:
        assert self.tracker is not None
        if self.record.step(step).state != "running":
            self.started(step)
        self._note(step, "done", result.seconds, self.record.run)
        self.tracker.ended(self.plan[step], result.seconds, self.store.artifact(result.key))
        self.view.change(step, "done", seconds=result.seconds)
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

    # -- the run's course

    def _execute(self) -> None:
        """Until nothing is left to do; what is found damaged is set aside and computed again."""
        # MLflow and Ray each take seconds to start: side by side.
        with ThreadPoolExecutor(1) as pool:
            tracking = pool.submit(self._track)
            if not self._all_cached():
                from pipeline.execute import session

                with session(self.plan):
                    self.tracker = tracking.result()
                    self._execute_in_session()
            self.tracker = tracking.result()

    def _execute_in_session(self) -> None:
        from pipeline.execute import execute

        for _ in range(REPAIRS + 1):
            failures = execute(self.plan, self.store, self.record.run, self.record.git_commit, self)
            damaged = {failure.rotten: failure.problem for failure in failures if failure.rotten}
            if not failures:
                return
            if any(not failure.rotten for failure in failures):
                break
            for key, problem in damaged.items():
                self._set_aside(key, problem)
        self._fail(failures)

    def _fail(self, failures: Sequence[Any]) -> None:
        self.record.error = redacted("\n".join(str(failure) for failure in failures))
        raise RunFailed(self.record, "\n".join(failure.details for failure in failures))

    def _finish(self) -> RunRecord:
        """Close the books."""
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
        self.record.status = "failed"
        self.record.error = self.record.error or redacted(f"{type(error).__name__}: {error}").strip()
        for step in self.record.steps:
            if step.state == "running":
                step.state = "pending"
        record.save(self.store, self.record)
        if self.tracker is not None:
            self.tracker.finished(self.record)

    def _track(self) -> Tracker:
        from pipeline.track import Tracker

        files = Path(self.store.root) / "mlflow-files" if self.tracking_uri().startswith("sqlite:") else None
        tracker = Tracker(self.tracking_uri(), self.plan.job.tracking.experiment, self.record, self.plan, files)
        record.save(self.store, self.record)
        return tracker

    def _open_record(self) -> tuple[RunRecord, RunRecord | None]:
        """This run's record, going on from the one that an earlier start of it left."""
        name = record.run_name(self.plan)
        past = record.load_or_none(self.store, name)
        steps = [self._open_step(step.name, step.key, past) for step in self.plan.steps]
        opened = RunRecord(
            run=name,
            name=self.plan.job.name,
            status="running",
            started=past.started if past else datetime.now(UTC).isoformat(timespec="seconds"),
            job=self.plan.job.model_dump(mode="json"),
            steps=steps,
            mlflow_uri=past.mlflow_uri if past else None,
            mlflow_run=past.mlflow_run if past else None,
            git_commit=past.git_commit if past else git_commit(),
        )
        return opened, past

    def _open_step(self, name: str, key: str, past: RunRecord | None) -> StepRecord:
        manifest = self.store.manifest(key)
        mlflow_run = past.step(name).mlflow_run if past else None
        if manifest is None:
            return StepRecord(name=name, key=key, state="pending", mlflow_run=mlflow_run)
        origin = manifest.origin
        return StepRecord(
            name=name, key=key, state="cached", seconds=origin.seconds, made_by=origin.run, mlflow_run=mlflow_run
        )

    def _all_cached(self) -> bool:
        return all(state == "cached" for state in self.plan.states(self.store).values())

    def _reads_files(self) -> bool:
        """Whether steps read checkpoints or statistics that somebody else made."""
        job = self.plan.job
        scions = any(getattr(edit, "scions", None) for edit in job.graft)
        return job.weights.kind == "checkpoint" or scions or "fid" in job.evaluate.metrics

    def _tracked_already(self) -> bool:
        return self.past is not None and self.past.status == "finished" and self.past.mlflow_uri == self.tracking_uri()

    def _note(self, step: str, state: record.StepState, seconds: float, made_by: str | None) -> None:
        entry = self.record.step(step)
        entry.state, entry.seconds, entry.made_by = state, seconds, made_by
        record.save(self.store, self.record)

    def _set_aside(self, key: str, problem: str) -> None:
        aside = self.store.quarantine(key)
        self.view.say(f"damaged: {problem}; set aside in {aside} and computed again")


def git_commit() -> str | None:
    """The commit of the folder that the job is started from, if it is a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
