"""Where a run's figures go: the MLflow server or database, and the experiment in it.

The spec decides. What it leaves out, MLflow's own variables give, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME; then
an earlier start of the same run; then the defaults, a database file in the store and the experiment `graftwork`.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.tracking import mlflow_database
from graftwork.specs.job import TrackingSpec
from graftwork.specs.masking import masked, secret_in
from graftwork.specs.problems import SpecError, shown
from graftwork.specs.secrets import filled

URI, EXPERIMENT, EXPERIMENT_ID = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
OWN = "mlflow.db"  # of the store; as a record has it, which may be moved with its store
DEFAULT_EXPERIMENT = "graftwork"
ACCEPTED = "accepted: a running MLflow server, or sqlite:///file"


@dataclass(frozen=True)
class Destination:
    """An MLflow server or database, and an experiment in it."""

    uri: str  # with placeholders, to be used through `address`
    recorded_uri: str  # as a record has it: without secrets, and without the place of the store
    experiment: str
    field: str = "tracking.uri"  # that named it
    notes: tuple[str, ...] = ()  # what users should know of the choice, a line each

    @property
    def address(self) -> str:
        """The URI with its secrets, to connect to; raises SpecError for a placeholder that is not set."""
        return filled(self.uri, self.field)

    @property
    def name(self) -> str:
        """The URI as it may be shown."""
        return self.recorded_uri if self.uri == f"${{{URI}}}" else masked(self.uri)

    @cached_property
    def database(self) -> Path | None:
        """The database file, if it is one."""
        return mlflow_database.database_file(self.address)

    def relocate(self) -> None:
        """Have a database that was moved keep its pictures beside it, if it can be written."""
        if self.database is not None:
            with suppress(sqlite3.Error, OSError):  # whoever writes into it comes to the same error, and tells
                mlflow_database.relocate(self.database)

    def check(self) -> None:
        """Raise SpecError if a run could not be recorded there, as far as can be known before."""
        if mlflow_database.is_sqlite(self.address):
            unfit = "which keeps nothing" if self.database is None else self._database_problem(self.database)
        else:
            from graftwork.pipeline.tracking.mlflow_server import problem  # MLflow takes seconds to import

            unfit = problem(self.address, self.experiment)
        if unfit is not None:
            accepted = "" if "accepted: " in unfit else f"; {ACCEPTED}"
            raise SpecError([f"{self.field}: got {shown_uri(self.name)}, {unfit}{accepted}"])

    def _database_problem(self, database: Path) -> str | None:
        is_new_store = (
            self.recorded_uri == OWN and not database.exists()
        )  # whether it can be written is the store's to say
        return None if is_new_store else mlflow_database.problem(database, self.experiment)


def shown_uri(uri: str) -> str:
    return uri if "://" in uri else shown(uri)


def destination(spec: TrackingSpec, store: Store, past: RunRecord | None) -> Destination:
    """Return where the figures of a job's run go; raise SpecError. past: the run's record by an earlier start."""
    notes: list[str] = []
    named, variable, before = spec.uri, os.environ.get(URI), past.mlflow_uri if past else None
    if named is not None:
        uri, recorded_uri, field = named, named, "tracking.uri"
        if variable and variable != named:
            notes.append(f"{URI} is not used: the spec has tracking.uri {masked(named)}")
    elif variable:
        uri, recorded_uri, field = variable, masked(variable), URI
        if secret_in(variable):
            uri = f"${{{URI}}}"
        notes.append(f"figures go to MLflow at {recorded_uri}, by {URI}")
    elif before is not None and before != OWN:
        uri, recorded_uri, field = before, before, "tracking.uri"
        if secret_in(before.replace("***", "secret")):
            raise SpecError([f"{URI}: got nothing; accepted: the URI that this run's figures went to, {before}"])
    elif store.local:
        if "?" in str(store.root):  # what follows would be no part of the database's path
            raise SpecError(
                [f"store: got {shown(str(store.root))}; accepted: a path without ?, or tracking.uri as well"]
            )
        uri, recorded_uri, field = f"sqlite:///{store.root}/{OWN}", OWN, "tracking.uri"
    else:
        accepted = f"an MLflow server, here or in {URI}, needed when the store is not a folder"
        raise SpecError([f"tracking.uri: got nothing; accepted: {accepted}"])
    if store.local and mlflow_database.database_file(uri) == Path(store.root) / OWN:
        recorded_uri = OWN
    experiment, said = _experiment(spec.experiment, past)
    return Destination(uri, recorded_uri, experiment, field, (*notes, *said))


def _experiment(named: str | None, past: RunRecord | None) -> tuple[str, list[str]]:
    """The experiment's name, and what users should know of the choice."""
    variable, notes = os.environ.get(EXPERIMENT), []
    if EXPERIMENT_ID in os.environ:
        notes.append(f"{EXPERIMENT_ID} is not used: tracking.experiment and {EXPERIMENT} name an experiment")
    if named is not None:
        if variable and variable != named:
            notes.append(f"{EXPERIMENT} is not used: the spec has tracking.experiment {named!r}")
        return named, notes
    if variable:
        return variable, [*notes, f"figures go to MLflow's experiment {variable!r}, by {EXPERIMENT}"]
    return (past.mlflow_experiment if past else None) or DEFAULT_EXPERIMENT, notes
