"""Where a run's entries go in MLflow: its experiment, and the MLflow run of each step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException

from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.tracking import mlflow_database
from graftwork.pipeline.tracking.destination import Destination
from graftwork.pipeline.tracking.entries import Begin
from graftwork.pipeline.tracking.mlflow_database import restoring
from graftwork.pipeline.tracking.mlflow_server import find_experiment
from graftwork.pipeline.tracking.outbox import Refused, Unanswered

ID = "graftwork.id"  # the tag by which a run is found whose creation was not answered


class MlflowExperiment:
    """The experiment of a destination, and the client that reaches it. Both are made when they are first asked for."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination

    @cached_property
    def client(self) -> MlflowClient:
        if self.destination.database is not None:
            mlflow_database.make(self.destination.database)
            mlflow_database.relocate(self.destination.database)
        return MlflowClient(tracking_uri=self.destination.address)

    @cached_property
    def id(self) -> str:
        """Its id; it is made if there is none. Raises Unanswered if it is deleted."""
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

    def check(self) -> None:
        """Ask the server for it; raises Unanswered if it is deleted, and what the client raises."""
        self._check_active(self.client.get_experiment(self.id))

    def forget(self) -> None:
        """It is gone: look for it again when it is next asked for."""
        self.__dict__.pop("id", None)

    def _check_active(self, known: Experiment) -> None:
        if known.lifecycle_stage == "deleted":
            remedy = restoring(self.destination.name, known.experiment_id)
            raise Unanswered(f"has the experiment {known.name!r} as deleted; {remedy}")


class MlflowRuns:
    """The MLflow run of each name: that of a run of ours, or of one of its steps. It is noted in the run's record.

    A run is made once, although requests may go unanswered: it is looked for by its tag before another is made, and
    what an unanswered request made after all is deleted.
    """

    def __init__(self, experiment: MlflowExperiment, record: RunRecord) -> None:
        self.experiment, self.record = experiment, record
        self.ids: dict[str, str] = {}  # name -> MLflow run, seen to be there
        self.doubtful: set[str] = set()  # names under which an unanswered request may yet make another run

    @property
    def client(self) -> MlflowClient:
        return self.experiment.client

    def id(self, name: str) -> str:
        """The MLflow run of a name; raises Refused where there is none."""
        run = self.find(name)
        if run is None:
            raise Refused(f"has no run of {name}")
        return run

    def find(self, name: str) -> str | None:
        """The MLflow run of a name: noted in the record, or found by its tag; None where there is none."""
        if name in self.ids:
            return self.ids[name]
        noted = self._noted(name)
        if noted is not None and self._is_active(noted):
            return self._note(name, noted)
        left = self._search(name) if name in self.doubtful else self._left.get(name, [])
        candidates = sorted(left, key=lambda run: (-len(run.data.metrics), run.info.run_id))
        if not candidates:
            return None
        self._delete_others(candidates, candidates[0].info.run_id)
        return self._note(name, candidates[0].info.run_id)

    def create(self, entry: Begin) -> str:
        """Make the run that the entry begins."""
        tags = entry.tags | {ID: self._tag(entry.run)}
        if entry.parent is not None and (parent := self.find(entry.parent)):
            tags["mlflow.parentRunId"] = parent
        try:
            made = self.client.create_run(self.experiment.id, start_time=entry.at, tags=tags, run_name=entry.run)
        except Exception:
            self.doubtful.add(entry.run)
            raise
        return self._note(entry.run, made.info.run_id)

    def settle(self, name: str) -> None:
        """Delete what unanswered requests made under a name beside its run."""
        if name in self.doubtful:
            self._delete_others(self._search(name), self.id(name))

    def forget(self) -> None:
        """The experiment is gone, and so are they: look for them again."""
        self.experiment.forget()
        self.__dict__.pop("_left", None)
        self.ids.clear()

    @cached_property
    def _left(self) -> dict[str, list[Run]]:
        """What earlier starts of the run left, by name: asked for once, as most runs of a job are new."""
        prefix, token, by_name = self._tag(""), None, dict[str, list[Run]]()
        while True:
            page = self.client.search_runs([self.experiment.id], f"tags.`{ID}` LIKE '{prefix}%'", page_token=token)
            for run in page:
                if (tag := run.data.tags[ID]).startswith(prefix):  # LIKE has _ for any character
                    by_name.setdefault(tag.removeprefix(prefix), []).append(run)
            if not (token := page.token):
                return by_name

    def _search(self, name: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment.id], f"tags.`{ID}` = '{self._tag(name)}'"))

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
