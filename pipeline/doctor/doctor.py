"""`graft doctor`: what is wrong with a machine, or with a cluster's nodes, and what to do; in under a minute.

What a check works with loads in the process that makes it: an environment in which Ray or torch is broken has a doctor,
too. With RAY_ADDRESS all nodes of that cluster are looked at; with a dashboard's address this very command runs there.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.cluster.checks import devices, health
from graftwork.cluster.checks.probes import Check, Probe, State, fine, refused, run_phases, run_probes, warning
from graftwork.specs.job import JobSpec
from graftwork.specs.paths import settle_home
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import load
from graftwork.specs.store import DEFAULT_STORE

if TYPE_CHECKING:
    from graftwork.cluster.checks.inspection import Node, Phases

SECONDS = 45.0  # for all checks of a machine, but the job's
JOB_SECONDS = 15.0
MIN_PEAK_SHARE = 0.4  # of a GPU's peak by its data sheet
HERE = "graftwork.pipeline.doctor.checkup"
STATES: tuple[State, ...] = ("fine", "warning", "broken")
FORMAT = 1  # of the document: raised when a name in it changes its meaning

Tell = Callable[[Check], object]


@dataclass(frozen=True)
class Checkup:
    """All checks of a machine or a cluster, and how long they took."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def state(self) -> State:
        """Return the worst of the checks' states."""
        return max((check.state for check in self.checks), key=STATES.index, default="fine")

    def document(self) -> dict[str, Any]:
        """Return the same for JSON."""
        checks = [asdict(check) for check in self.checks]
        return {"format": FORMAT, "state": self.state, "seconds": round(self.seconds, 1), "checks": checks}


def doctor(
    job: JobSpec | str | Path | None = None,
    overrides: Iterable[str] = (),
    store: str | None = None,
    address: str | None = None,
    tell: Tell = lambda check: None,
) -> Checkup:
    """Check this machine, or the cluster of RAY_ADDRESS or `address`, and a job against it; raise SpecError for a job
    or an address that is none.

    store: by default the job's, or `.graftwork`. address: of a dashboard, as http://head:8265. tell: gets each check as
    it is made.
    """
    began = time.monotonic()
    settle_home()
    spec = job if job is None or isinstance(job, JobSpec) else load(job, overrides)
    if spec is not None and store is not None:
        spec = spec.model_copy(update={"store": store})
    place = spec.store if spec is not None else store
    if address is not None:
        made = _relay(spec, place, address)
    elif _names_a_cluster():
        made = _cluster(spec, place)
    else:
        made = _machine(spec, place or DEFAULT_STORE)
    checks = []
    for check in map(judged, made):
        checks.append(check)
        tell(check)
    return Checkup(tuple(checks), time.monotonic() - began)


def judged(check: Check) -> Check:
    """Compare the check of a GPU's speed with its data sheet. Return other checks unchanged."""
    from graftwork.pipeline.estimates.speeds import PEAKS

    model = str(check.values.get("model", ""))
    peaks = next((peaks for name, peaks in PEAKS.items() if name in model), None)
    speed = check.values.get("bf16_flop_per_s")
    if peaks is None or not isinstance(speed, float) or check.state != "fine" or "MIG" in model:
        return check
    share = speed / peaks["bf16"]
    finding = f"{check.seen}; bf16 at {share:.0%} of the data sheet's peak"
    values = {**check.values, "peak_share": share}
    if share >= MIN_PEAK_SHARE:
        return replace(check, seen=finding, values=values)
    advice = "others use the GPU, it is too hot or its power is limited: nvidia-smi -q -d PERFORMANCE"
    return replace(check, seen=finding, values=values, state="warning", advice=advice)


# -- one machine


def _names_a_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "").strip() not in ("", "local")


def _machine(job: JobSpec | None, store: str) -> Iterator[Check]:
    checks = []
    # The cluster of RAY_ADDRESS, if there is one, was asked before.
    ray = Probe("Ray", f"{HERE}:check_ray", seconds=40.0, advice="what Ray writes is below TMPDIR, in graft-*")
    others = [*([] if _names_a_cluster() else [ray]), *_tracking(job, store)]
    for check in run_phases(phases(others, job, store), SECONDS):
        checks.append(check)
        yield check
    if job is not None:
        gpus = [check for check in checks if check.name.startswith("GPU ")]
        yield from run_probes([_fit(job, None, gpus)])


def phases(others: list[Probe], job: JobSpec | None, store: str | None, marker: str | None = None) -> Phases:
    """Return the probes of a machine: what waits for something side by side, then what is timed alone.

    marker: a file in the store that another node wrote.
    """
    files = [Probe("job's files", f"{HERE}:check_files", {"job": _dumped(job)}, JOB_SECONDS)] if job else []
    stored = {"url": store, "marker": marker}
    reach = "the way to the store: its endpoint, a proxy, or a file system that hangs"
    stores = [Probe("store", f"{HERE}:check_store", stored, 20.0, reach)] if store is not None else []
    hub = Probe(
        "hub", f"{HERE}:check_hub", advice="HF_HOME names a folder that answers; HF_HUB_OFFLINE=1", late="warning"
    )
    together = [[*health.PROBES], stores, [hub, *files], [devices.IMPORTS], others]
    return [[chain for chain in together if chain], [devices.PROBES]]


def _tracking(job: JobSpec | None, store: str) -> list[Probe]:
    argument = {"store": store, "tracking": job.tracking.model_dump(mode="json") if job is not None else None}
    return [Probe("MLflow", f"{HERE}:check_mlflow", argument, 30.0, "look at the server that tracking.uri names")]


def _fit(job: JobSpec, nodes: list[dict[str, float]] | None, gpus: list[Check]) -> Probe:
    """Return the probe whether a job fits. nodes: None for this machine. gpus: the checks of all GPUs."""
    cards = [dict(check.values) for check in gpus if "model" in check.values]
    advice = "graft plan says more; listing many files may take longer"
    argument = {"job": _dumped(job), "nodes": nodes, "gpus": cards}
    return Probe("job", f"{HERE}:check_job", argument, JOB_SECONDS, advice, late="warning")


def _dumped(job: JobSpec) -> dict[str, Any]:
    return job.model_dump(mode="json")


# -- a cluster


def _cluster(job: JobSpec | None, store: str | None) -> Iterator[Check]:
    """Check all nodes of the cluster that RAY_ADDRESS names, or this machine if the cluster cannot be joined."""
    from graftwork.cluster.checks.inspection import inspect_nodes, nodes
    from graftwork.cluster.session.runtime import session
    from graftwork.cluster.session.scratch import RayDidNotStart

    place = None if store is None else store if "://" in store else str(Path(store).absolute())
    try:
        with session([], 1):
            there = nodes()
            yield _members(there)
            with _marker(place, len(there)) as marker:
                checks = []
                for check in inspect_nodes(there, phases([], job, place, marker), SECONDS):
                    checks.append(check)
                    yield check
            yield from run_probes(_tracking(job, place) if place is not None else [])
            if job is not None:
                gpus = [check for check in checks if check.name.startswith("GPU ")]
                amounts = [dict(node.resources) for node in there]
                yield from run_probes([_fit(job, amounts, gpus)])
        return
    except SpecError as error:
        yield from (refused("cluster", line) for line in error.lines)
    except RayDidNotStart as error:
        yield refused("cluster", str(error))
    yield from _machine(job, store or DEFAULT_STORE)


def _members(there: list[Node]) -> Check:
    cpus, gpus = (sum(node.resources.get(name, 0.0) for node in there) for name in ("CPU", "GPU"))
    return fine("cluster", f"{len(there)} nodes, {cpus:g} CPUs, {gpus:g} GPUs", nodes=float(len(there)))


@contextmanager
def _marker(place: str | None, nodes: int) -> Iterator[str | None]:
    """Have a file in a store of several nodes, by which each sees that they share it."""
    from graftwork.pipeline.doctor.checkup import without_new_folders
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.pipeline.store.errors import StoreError

    name = f"runs/.probe-{secrets.token_hex(16)}"
    with ExitStack() as stack:
        written = None
        with suppress(StoreError):  # the nodes come to the same error, and tell
            if place is not None and nodes > 1:
                store = Store(place)
                stack.enter_context(without_new_folders(store))
                store.files.write(name, b"shared")
                written = name
        try:
            yield written
        finally:
            with suppress(StoreError):
                if written is not None:
                    store.files.remove(written)


def _relay(job: JobSpec | None, store: str | None, address: str) -> Iterator[Check]:
    """Run this command on a cluster's head, and hand on what it says."""
    from graftwork.cluster.jobs import check_url
    from graftwork.pipeline.execution import remote

    check_url(address)
    if job is not None:
        job = remote.with_tracking(job)
        yield from (refused("job's places", line) for line in remote.homeless(job))
    elif store is None:
        advice = "--store URL, or a job"
        yield warning("store", "none was named, so none was looked at, nor MLflow", advice)
    try:
        cluster = remote.connect(address)
        yield fine("dashboard", f"{address} answers")
        command = [*remote.GRAFT, "doctor", *([remote.JOB_FILE] if job is not None else []), "--json"]
        command += ["--store", remote.store_of(None, "", store)] if job is None and store is not None else []
        with remote.staged(job) as folder:
            answer = cluster.ask(command, folder)
    except SpecError as error:
        yield from (refused("cluster", line) for line in error.lines)
        return
    yield from _answered(answer.stdout, answer.stderr)


def _answered(stdout: str, stderr: str) -> Iterator[Check]:
    """Yield the checks of a document that came from the cluster."""
    try:
        document: Mapping[str, Any] = json.loads(stdout)
        checks = [Check(**check) for check in document["checks"]]
    except (ValueError, KeyError, TypeError):
        lines = [line for line in stderr.splitlines() if line.strip()] or ["nothing"]
        yield refused("cluster", f"its head could not run graft doctor: {lines[-1]}")
        return
    yield from checks
