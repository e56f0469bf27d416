"""Checks of what a job works with: the store, MLflow, the hub's cache, Ray, and whether the job itself fits.

Functions for `graftwork.cluster.checks.probes`, each with what JSON can hold for an argument.
"""

from __future__ import annotations

import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.cluster.checks.health import check_disk
from graftwork.cluster.checks.probes import Check, broken, fine, refused, warning
from graftwork.specs.figures import amount
from graftwork.specs.hub import hub_cache, is_offline
from graftwork.specs.problems import SpecError

if TYPE_CHECKING:
    from graftwork.pipeline.planning.plan import Plan, Step
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.specs.job import JobSpec

STORED_BYTES = 4 * 2**20  # that are written to a store, read and removed again
RETRY_SECONDS = 3.0  # of a store that does not answer
ANSWER_SECONDS = 5.0  # for MLflow and the hub
HUB = "https://huggingface.co"
ANY_CPUS = 1e6  # as many as any task asks for
SLOW_STORE = 2e6  # bytes a second: below that features take longer to move than to make
WEIGHTS_BYTES, SPLIT_BYTES = 4, 16  # a parameter in training: itself; its gradient, average and moments, split by ZeRO
KEPT_BYTES = 28  # a parameter in the store: a base, a graft with its average, and a checkpoint of its training

# -- places


def check_store(argument: Mapping[str, Any]) -> Iterator[Check]:
    """Write to a store, read that and remove it. argument: `url`; `marker`, a file that another node wrote, or None."""
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.pipeline.store.errors import StoreError

    try:
        store = Store(argument["url"])
        store.files.retry_seconds = RETRY_SECONDS
        yield _speed(store, argument.get("marker"))
        if store.local:
            yield check_disk("store's disk", Path(store.root), "put the store on a larger disk: store: PATH")
    except StoreError as error:
        yield broken("store", f"{error.url}, {error.problem}", error.remedy)
    except FileNotFoundError as error:  # no folder can be made there, as below /proc
        yield broken("store", f"{argument['url']} cannot be made ({error})", "accepted: a folder, or a URL")


def _speed(store: Store, marker: str | None) -> Check:
    content, name = secrets.token_bytes(STORED_BYTES), f"runs/.probe-{secrets.token_hex(16)}"
    with without_new_folders(store):
        began = time.monotonic()
        store.files.write(name, content)
        written = time.monotonic()
        try:
            same = store.files.read(name) == content
            read = time.monotonic()
        finally:
            store.files.remove(name)
        shared = marker is None or _holds(store, marker)
    speeds = {
        "write_bytes_per_s": STORED_BYTES / (written - began),
        "read_bytes_per_s": STORED_BYTES / (read - written),
    }
    writes, reads = (f"{amount(speed)}/s" for speed in speeds.values())
    finding = f"{store.url} takes {writes}, gives {reads}"
    if not same:
        return broken("store", f"{finding}; it gives back something else than was written", "use another file system")
    if not shared:
        advice = "a folder that all nodes share, or a URI as s3://bucket/prefix"
        return broken("store", f"{store.url} is another folder here than on the head", advice)
    if min(speeds.values()) < SLOW_STORE:
        return warning(
            "store", finding, "a store nearer to the nodes: checkpoints and features go through it", **speeds
        )
    return fine("store", finding, **speeds)


def _holds(store: Store, marker: str) -> bool:
    try:
        return bool(store.files.read(marker))
    except FileNotFoundError:
        return False


@contextmanager
def without_new_folders(store: Store) -> Iterator[None]:
    """Remove the folders of a store that were not there before, if nothing is left in them."""
    root = Path(store.root)
    fresh = [folder for folder in (root / ".drafts", root / "runs", root) if store.local and not folder.exists()]
    try:
        yield
    finally:
        for folder in fresh:
            with suppress(OSError):  # another process's file is in it
                folder.rmdir()


def check_mlflow(argument: Mapping[str, Any]) -> Check:
    """Ask MLflow as a run would. argument: `store`, its URL; `tracking`, of a job, or nothing."""
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.pipeline.tracking.destination import destination, shown_uri
    from graftwork.specs.job import TrackingSpec

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{ANSWER_SECONDS:.0f}")
    has_job = argument.get("tracking") is not None
    try:
        there = destination(TrackingSpec(**(argument.get("tracking") or {})), Store(argument["store"]), None)
        there.check()
    except SpecError as error:
        return refused(
            "MLflow", error.lines[0], "broken" if has_job or os.environ.get("MLFLOW_TRACKING_URI") else "warning"
        )
    where = "a database in the store" if there.recorded_uri == "mlflow.db" else shown_uri(there.name)
    return fine("MLflow", f"{where} takes figures, in the experiment {there.experiment!r}")


def check_hub() -> Iterator[Check]:
    """Look at the hub's cache on this machine, and whether the hub answers."""
    cache = hub_cache()
    yield check_disk("hub cache", cache, "HF_HOME or HF_HUB_CACHE names a larger place that can be written")
    if is_offline():
        yield fine("hub", "HF_HUB_OFFLINE is set: nobody asks it")
        return
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    advice = "HF_HUB_OFFLINE=1 if weights are in the cache or in files; else open the way, or set HF_ENDPOINT"
    began = time.monotonic()
    try:
        urllib.request.urlopen(endpoint, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code == 407:
            yield warning("hub", f"{endpoint} answers {error.code}", advice)
            return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield warning("hub", f"{endpoint} does not answer ({reason})", advice)
        return
    yield fine("hub", f"{endpoint} answers in {time.monotonic() - began:.1f} s")


def check_ray() -> Check:
    """Start a Ray of our own, as `graft run` does, and have it do something."""
    from graftwork.pipeline.planning.preflight import check_ray

    check_ray()
    began = time.monotonic()
    import ray

    from graftwork.cluster.session.runtime import session

    with session([], 1):
        started = time.monotonic() - began
        if ray.get(ray.remote(_answer).remote()) != "done":
            return broken("Ray", "a task gives something else than it returned", "make the environment anew")
    return fine("Ray", f"{ray.__version__} starts in {started:.1f} s and does a task", seconds=round(started, 2))


def _answer() -> str:
    return "done"


# -- the job


def check_files(argument: Mapping[str, Any]) -> Iterator[Check]:
    """Look for the files that a job names. argument: `job`."""
    from graftwork.pipeline.planning import preflight
    from graftwork.specs.reading.load import job_from

    job = job_from(dict(argument["job"]))
    fetchable = [] if is_offline() else preflight.unfetched(job)
    absent = preflight.absent(job)
    for line in absent:
        advice = "have it in the hub's cache before: hf download, on every node"
        yield refused("job's files", line, "warning" if line in fetchable else "broken", advice)
    if not absent:
        yield fine("job's files", "all that it names are here")


def check_job(argument: Mapping[str, Any]) -> Iterator[Check]:
    """Plan a job and hold it against what there is.

    argument: `job`; `nodes`, each as amounts by Ray's names, or None for a Ray of our own; `gpus`, each with its
    `model` and `total_bytes`.
    """
    from graftwork.pipeline import api
    from graftwork.pipeline.planning import preflight
    from graftwork.pipeline.store.errors import StoreError
    from graftwork.specs.reading.load import job_from
    from graftwork.stages.data.listing import listing_once

    job = job_from(dict(argument["job"]))
    with listing_once():
        try:
            plan = api.plan(job)
            lines = [*preflight.notes(job), *plan.notes]
        except SpecError as error:
            yield from (refused("job", line) for line in error.lines)
            return
        except StoreError as error:
            yield broken("job", error.problem, error.remedy)
            return
        yield fine("job", f"{len(plan.steps)} steps" + "".join(f"; {line}" for line in lines))
        nodes, gpus = argument["nodes"], argument["gpus"]
        own = nodes is None
        yield from _resources(plan, [own_resources(gpus)] if own else nodes, own)
        yield from _memory(job, plan, min((float(gpu["total_bytes"]) for gpu in gpus), default=None), own)


def own_resources(gpus: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a Ray of our own has on this machine with these GPUs, by Ray's names.

    It claims as many CPUs as any task asks for; tasks then share those there are.
    """
    from graftwork.cluster.machine import available_memory
    from graftwork.cluster.session import ray_internals

    types = {ray_internals.NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(gpu["model"]) for gpu in gpus}
    named = {f"accelerator_type:{name}": 1.0 for name in types if name}
    return {"CPU": ANY_CPUS, "GPU": float(len(gpus)), "memory": float(available_memory()), **named}


def _resources(plan: Plan, nodes: Sequence[Mapping[str, float]], own: bool) -> Iterator[Check]:
    """Compare the resources that each kind of task takes with those of the nodes, as Ray does."""
    from graftwork.cluster.session.runtime import amounts_line, node_amounts, room_in

    misfit = False
    for step in {(step.stage, str(step.resources)): step for step in plan.steps}.values():
        workers = step.workers
        least = _least_workers(plan, step, workers)
        room = room_in(nodes, step.resources) if any(node_amounts(step.resources).values()) else workers
        if room >= workers:
            continue
        misfit = True
        wanted = f"{step.stage}: " + (f"{workers} workers of " if workers > 1 else "") + amounts_line(step.resources)
        has = "; ".join(_amounts(node) for node in nodes) or "no node"
        finding = f"{wanted}; there is room for {room} on {has}"
        advice = f"resources.{step.stage} of what there is" + (
            f", or fewer {step.stage}.workers" if workers > 1 else ""
        )
        if not own:
            advice += "; or nodes that an autoscaler can bring"
        yield (warning if least <= room else broken)("job's resources", finding, advice)
    if not misfit:
        yield fine("job's resources", "every step has room")


def _least_workers(plan: Plan, step: Step, workers: int) -> int:
    recipes = {"base": plan.job.weights, "distill": plan.job.distill, "finetune": plan.job.finetune}
    return getattr(recipes.get(step.stage), "min_workers", None) or workers


def _amounts(node: Mapping[str, float]) -> str:
    """Return what a node has, as people read it; CPUs of which there are as many as wanted are not told."""
    amounts = [f"{node.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if node.get(name) != ANY_CPUS]
    return ", ".join([*amounts, amount(node.get("memory", 0.0)) + " of memory"])


def _memory(job: JobSpec, plan: Plan, gpu_bytes: float | None, own: bool) -> Iterator[Check]:
    """Compare the least memory and storage that a job takes with what is available; activations are not counted."""
    from graftwork.cluster.machine import available_memory
    from graftwork.pipeline import api
    from graftwork.pipeline.store.artifacts import Store

    cost = api.costs(job)
    if cost is None:
        yield fine("job's memory", "not known before the search, or without the data")
        return
    params, workers = max(cost.rootstock.params, cost.graft.params), job.finetune.workers
    per_worker = params * (WEIGHTS_BYTES + SPLIT_BYTES / workers)
    if job.finetune.teacher is not None:
        per_worker += cost.rootstock.params * WEIGHTS_BYTES
    values = {"worker_bytes": per_worker}
    finding = f"finetune: at least {amount(per_worker)} a worker, activations not counted"
    advice = "raise finetune.workers, or use GPUs or nodes with more memory"
    on_gpu = plan["finetune"].resources.gpu > 0
    room = gpu_bytes if on_gpu else available_memory() / workers if own else None
    if room is not None and per_worker > room:
        yield broken("job's memory", f"{finding}; there are {amount(room)}", advice, **values)
    else:
        yield fine("job's memory", finding, **values)
    store = Store(job.store)
    if store.local:
        yield _room_in_store(job, params, Path(store.root))


def _room_in_store(job: JobSpec, params: int, root: Path) -> Check:
    import shutil

    from graftwork.stages.data.sources import class_sizes

    images = 0
    with suppress(OSError, ValueError):  # the data are elsewhere: `job's files` says so
        images = sum(class_sizes(job.data))
    needed = KEPT_BYTES * params + 4 * images * job.codec.latent_channels(job.data) * job.latent_side() ** 2
    there = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    finding = f"about {amount(needed)} of {amount(free)} that are free, for features and models"
    if needed > free:
        return broken("job's store", finding, "a store on a larger disk", needed_bytes=float(needed))
    return fine("job's store", finding, needed_bytes=float(needed))
