"""Runs on a cluster somewhere else: the project and the job travel there, and the cluster does what the commands do.

A store may be within the cluster's reach only: whatever has to read it runs there too, as a short job that answers
with what the same command prints.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

import graftwork
from graftwork.pipeline.execution.run import git_commit
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.runs.record import COMMIT, SUBMISSION
from graftwork.pipeline.tracking.destination import EXPERIMENT, URI
from graftwork.specs.job import JobSpec
from graftwork.specs.masking import masked, secret_in
from graftwork.specs.reading.load import SpecError, load
from graftwork.specs.secrets import PLACEHOLDER_HINT
from graftwork.stages.data.sources import are_here

if TYPE_CHECKING:
    from graftwork.cluster.jobs import Answer, Cluster, Submission

JOB_FILE = "job.yaml"
GRAFT = ("python", "-m", "graftwork.pipeline")
JOB, STORE = "graftwork.job", "graftwork.store"  # in a submission's metadata
STOP_SECONDS = 300.0  # that a run has to save what it has; its driver allows its tasks less


def submit(job: JobSpec | str | Path, address: str, overrides: Iterable[str] = ()) -> str:
    """Send a job to a Ray cluster and return the submission's id; raises SpecError where it cannot be sent."""
    spec = with_tracking(job if isinstance(job, JobSpec) else load(job, overrides))
    lines = homeless(spec)
    if lines:
        raise SpecError(lines)
    return _send(connect(address), spec.name, spec.store, ["run", JOB_FILE], spec)


def resume(name: str, address: str, store: str | None = None) -> str:
    """Resume a submission, or a run of `store`, as a new submission. Return the new one's id."""
    cluster = connect(address)
    submission = _find(cluster, name)
    place = store_of(submission, name, store)
    job = submission.metadata[JOB] if submission is not None else name
    return _send(cluster, job, place, ["resume", submission.id if submission else name, "--store", place], None)


def submissions(address: str) -> list[Submission]:
    """Graftwork's jobs on a cluster, the oldest first."""
    return _ours(connect(address))


def ask(command: str, names: Sequence[str], address: str, store: str | None = None, *options: str) -> Answer:
    """What `graft COMMAND NAME.. --store STORE` prints on the cluster. names: submissions, or runs of the store."""
    return _ask(connect(address), command, names, store, *options)


def logs(name: str, address: str) -> str:
    cluster = connect(address)
    return cluster.logs(_known(cluster, name).id)


def follow(name: str, address: str, write: Callable[[str], object]) -> Submission:
    """Hand on what a job prints as it comes; returns when it has ended."""
    cluster = connect(address)
    return cluster.follow(_known(cluster, name).id, write)


def stop(name: str, address: str, say: Callable[[str], object]) -> Submission:
    """Ask a submission to save and end. End it if it does not within `STOP_SECONDS`. Say which it was."""
    cluster = connect(address)
    submission = _known(cluster, name)
    if submission.ended:
        raise SpecError(
            [f"run: got {submission.id!r}, which is not running ({submission.state}); accepted: a run at work"]
        )
    answer = _ask(cluster, "stop", [submission.id], None)
    if answer.code == 0:
        say(f"{submission.id}: asked to stop; it has {STOP_SECONDS:.0f}s to save what it has")
        submission = cluster.wait(submission.id, STOP_SECONDS)
        if submission.ended:
            say(f"{submission.id}: stopped in good order")
            return submission
    else:
        say(f"{submission.id}: cannot be asked to stop: {answer.stderr or 'no answer'}")
    cluster.stop(submission.id)
    submission = cluster.wait(submission.id, STOP_SECONDS)
    say(f"{submission.id}: ended by Ray ({submission.state}); what its steps had saved is kept")
    return submission


def connect(address: str) -> Cluster:
    from graftwork.cluster.jobs import Cluster  # Ray takes a while to import

    return Cluster(address)


def with_tracking(job: JobSpec) -> JobSpec:
    """The job with what MLflow's variables say here, if its spec leaves it out: the nodes have other variables."""
    uri, experiment = os.environ.get(URI), os.environ.get(EXPERIMENT)
    if job.tracking.uri is None and uri and secret_in(uri):
        raise SpecError([f"{URI}: got {masked(uri)}; accepted: tracking.uri with {PLACEHOLDER_HINT}"])
    chosen = {"uri": job.tracking.uri or uri, "experiment": job.tracking.experiment or experiment}
    return job.model_copy(update={"tracking": job.tracking.model_copy(update=chosen)})


def homeless(job: JobSpec) -> list[str]:
    """A line for each place that would be lost with the job's folder on the cluster."""
    lines = []
    accepted = "a URI, as s3://bucket/prefix, or the absolute path of a folder that all nodes share"
    if _relative(job.store):
        lines.append(f"store: got {job.store!r}, a folder of this machine; accepted: {accepted}")
    if job.tracking.uri is None:
        if "://" in job.store and urlsplit(job.store).scheme not in ("file", "local"):
            lines.append("tracking.uri: got nothing; accepted: an MLflow server, needed when the store is not a folder")
    elif _relative(job.tracking.uri):
        wanted = "http://host:5000, or sqlite:////absolute/path"
        lines.append(f"tracking.uri: got {job.tracking.uri!r}, a file of this machine; accepted: {wanted}")
    return lines


def needed_there(job: JobSpec) -> list[str]:
    """Return a line for each path of this machine that the cluster's nodes must have, too."""
    return [
        f"{field}: {path!r} is a path of this machine; the cluster's nodes must have it, too"
        for field, path in preflight.paths(job)
        if Path(path).exists() or (field == "data.path" and are_here(job.data))
    ]


def store_of(submission: Submission | None, name: str, store: str | None) -> str:
    """The store of a submission, as it was sent; the one given, for a run that was started in another way."""
    place = submission.metadata.get(STORE) if submission is not None else store
    if place is None:
        raise SpecError([f"run: got {name!r}, no such submission; accepted: one of graft status --address, or --store"])
    if secret_in(place):
        raise SpecError([f"--store: got {masked(place)!r}; accepted: {PLACEHOLDER_HINT}"])
    if _relative(place):
        raise SpecError([f"--store: got {place!r}; accepted: a URI, or an absolute path on the cluster's nodes"])
    return place


@contextmanager
def staged(job: JobSpec | None) -> Iterator[Path]:
    """A folder with the project as it is installed here, and the job's file: what travels."""
    with tempfile.TemporaryDirectory(prefix="graftwork-") as folder:
        package = Path(graftwork.__file__).parent  # what is a link in a checkout becomes a folder
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        if job is not None:
            (Path(folder) / JOB_FILE).write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
        yield Path(folder)


def _send(cluster: Cluster, name: str, store: str, command: Sequence[str], job: JobSpec | None) -> str:
    submission = f"{name}-{uuid.uuid4().hex[:8]}"
    env = {SUBMISSION: submission, **({COMMIT: commit} if (commit := git_commit()) else {})}
    with staged(job) as folder:
        cluster.submit(submission, [*GRAFT, *command], folder, {JOB: name, STORE: store}, env)
    return submission


def _ask(cluster: Cluster, command: str, names: Sequence[str], store: str | None, *options: str) -> Answer:
    known = [(name, _find(cluster, name)) for name in names]
    stores = {store_of(found, name, store) for name, found in known}
    if len(stores) > 1:
        raise SpecError([f"{command}: got runs of several stores: {', '.join(sorted(stores))}; accepted: of one"])
    runs = [found.id if found is not None else name for name, found in known]
    with staged(None) as folder:
        return cluster.ask([*GRAFT, command, *runs, "--store", stores.pop(), *options], folder)


def _ours(cluster: Cluster) -> list[Submission]:
    return [one for one in cluster.submissions() if JOB in one.metadata]


def _find(cluster: Cluster, name: str) -> Submission | None:
    """The submission of that name, or the only one whose name starts so."""
    begun = [one for one in _ours(cluster) if one.id.startswith(name)]
    exact = [one for one in begun if one.id == name]
    return next(iter(exact or begun), None) if exact or len(begun) == 1 else None


def _known(cluster: Cluster, name: str) -> Submission:
    submission = _find(cluster, name)
    if submission is None:
        known = ", ".join(one.id for one in _ours(cluster)) or "none yet"
        raise SpecError([f"run: got {name!r}, no such submission on {cluster.address}; accepted: {known}"])
    return submission


def _relative(place: str) -> bool:
    """Whether a path, a URI or a database's URI means a file in the folder of whoever reads it."""
    scheme, is_uri, path = place.partition("://")
    if not is_uri:
        return not Path(place).is_absolute() and place != "databricks"
    if scheme.partition("+")[0] == "sqlite":  # sqlite:///relative and sqlite:////absolute
        return not path.startswith("//")
    return scheme in ("file", "local") and not path.startswith("/")
