"""Ray's runtime: start it on this machine, and set a task's process up so that its numbers do not depend on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, remove_placement_group

from graftwork.cluster.drivers import gpu_problem
from graftwork.cluster.machine import num_cpus
from graftwork.cluster.memory import keep_freed
from graftwork.cluster.session import ray_internals
from graftwork.cluster.session.address import check_cluster, cluster_address, head_of
from graftwork.cluster.session.imports import code_folders
from graftwork.cluster.session.local import job_config, local_settings, read_authentication
from graftwork.cluster.session.orphans import end_with_parent
from graftwork.cluster.session.scratch import RayDidNotStart
from graftwork.cluster.session.variables import environment
from graftwork.cluster.session.warm import Nursery
from graftwork.specs.resources import StepResources

if TYPE_CHECKING:
    import torch


TOO_SLOW = "timed out during startup"  # says Ray of a node that is not there after 30 s
KEPT_IDLE_MS = 60_000  # that a process without work is kept, with what it has imported


class NotEnough(Exception):
    """This machine cannot give a task what it asks for."""


class UnusableGpu(Exception):
    """A task's GPU that torch cannot compute on; the message is one line."""


@contextmanager
def session(demands: Iterable[StepResources], min_parallel: int, warm: Sequence[str] = ()) -> Iterator[None]:
    """Ray on this machine, or the cluster that RAY_ADDRESS names, for as long as the context lasts.

    demands: what single tasks take. min_parallel: how many one-CPU workers must be able to run side by side; a machine
    with fewer cores still runs them, slower. warm: modules that tasks need, to be imported once for all processes.
    Raises SpecError for a RAY_ADDRESS or a folder for temporary files that is of no use.
    """
    demands, address = list(demands), cluster_address()
    with ExitStack() as stack:
        if address is None:
            stack.enter_context(_ray_of_our_own(demands, min_parallel, warm))
        else:
            stack.enter_context(_joined(address))
        yield


@contextmanager
def _ray_of_our_own(demands: Sequence[StepResources], min_parallel: int, warm: Sequence[str]) -> Iterator[None]:
    cpus = max(num_cpus(), min_parallel, *(math.ceil(demand.cpu) for demand in demands))
    defaults = {
        # Stages that start workers hold a process each while they wait, which Ray would warn of as too many.
        "RAY_worker_maximum_startup_concurrency": str(4 * cpus),
        # Of those that are idle, Ray would end all but one a CPU after a second, and start others for the next step.
        "RAY_idle_worker_killing_time_threshold_ms": str(KEPT_IDLE_MS),
    }
    with ExitStack() as stack:
        settings = stack.enter_context(local_settings())
        if warm and Nursery.possible() and not any(demand.gpu for demand in demands):
            nursery = stack.enter_context(closing(Nursery(warm, code_folders())))
            settings["runtime_env"] = {"py_executable": nursery.py_executable}
            defaults["RAY_prestart_worker_first_driver"] = "0"  # they would not be of the nursery
        stack.enter_context(environment({name: os.environ.get(name, value) for name, value in defaults.items()}))
        stack.enter_context(_initialised(num_cpus=cpus, **settings))
        for demand in demands:
            if not room_for(demand):
                has = ray.cluster_resources()
                here = _amounts({name: has.get(name, 0.0) for name, amount in node_amounts(demand).items() if amount})
                raise NotEnough(
                    f"resources: got {amounts_line(demand)}; accepted: at most what this machine has, {here}"
                )
        yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """The cluster at `address`; raises SpecError where it cannot be joined from here."""
    mode = {"RAY_AUTH_MODE": "token"} if check_cluster(address) else {}
    try:
        with environment(mode):
            read_authentication()
            with _initialised(address=head_of(address)):
                yield
    finally:
        read_authentication()


@contextmanager
def _initialised(**settings: Any) -> Iterator[None]:
    try:
        _begin(settings)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if "_temp_dir" in settings:
            raise RayDidNotStart(f"{reason}; its logs are below {Path(settings['_temp_dir']).resolve()}") from error
        raise RayDidNotStart(f"{settings['address']} cannot be joined from here: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _begin(settings: Mapping[str, Any], tries: int = 3) -> None:
    """Start Ray or join it; start it again where that took too long: on a busy machine it gives up after 30 s."""
    for left in reversed(range(tries)):
        try:
            ray.init(logging_level="ERROR", log_to_driver=False, job_config=job_config(), **settings)
            return
        except Exception as error:
            ray.shutdown()  # of what had started
            if not left or TOO_SLOW not in " ".join(str(error).split()):
                raise


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def options(resources: StepResources, idle: bool = False) -> dict[str, Any]:
    """What Ray is told that a task takes. idle: it only waits for workers of its own, and takes nothing."""
    if idle:
        return {"num_cpus": 0}
    told: dict[str, Any] = {"num_cpus": resources.cpu, "num_gpus": resources.gpu, "resources": resources.custom}
    return told | ({"memory": resources.memory} if resources.memory else {})


def node_amounts(resources: StepResources) -> dict[str, float]:
    """The same by the names that nodes have for it."""
    memory = {"memory": float(resources.memory)} if resources.memory else {}
    return {"CPU": resources.cpu, "GPU": resources.gpu, **memory, **resources.custom}


def amounts_line(resources: StepResources) -> str:
    """The same for people: `1 CPU, 0.5 GPU`."""
    return _amounts({name: amount for name, amount in node_amounts(resources).items() if amount})


def room_for(resources: StepResources) -> int:
    """How many such tasks the nodes of the cluster could hold at once, if they had nothing else to do."""
    return room_in([node["Resources"] for node in ray.nodes() if node["Alive"]], resources)


def room_in(nodes: Iterable[Mapping[str, float]], resources: StepResources) -> int:
    """The same, of nodes that have these amounts."""

    def held_by(node: Mapping[str, float]) -> int:
        counts = [_fit(name, node.get(name, 0.0), amount) for name, amount in node_amounts(resources).items() if amount]
        return min(counts, default=1)

    return sum(map(held_by, nodes))


def _fit(name: str, there: float, amount: float) -> int:
    """How often an amount can be had of what is there; a share of a GPU is never made up of what is left of two."""
    shares = name == "GPU" and amount < 1
    return int(there) * int(1 / amount) if shares else int(there / amount)


def free_orphaned_groups() -> int:
    """Give back what this job's lost trainings still hold; returns how many groups that was.

    A placement group lives until its actor and its job are both gone. Ray Train has a helper that gives back the group
    of a lost controller, but tells it of the group only once all workers have started, and where there is no dashboard
    it cannot see who is alive. The controller is what makes the group here, and no other actor of a job makes any.
    """
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    orphaned = 0
    table = ray_internals.PlacementGroupTableData
    accessor = ray_internals.state._connect_and_get_accessor()
    for entry in accessor.get_placement_group_table():  # who made it is in no public answer
        group = table.FromString(entry)
        made_by_actor = not ray.ActorID(group.creator_actor_id).is_nil()  # one that is not counts as dead
        orphan = group.creator_job_id == job and made_by_actor and group.creator_actor_dead
        if orphan and group.state != table.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            orphaned += 1
    return orphaned


def group_name(task: str | None) -> str:
    """Of the placement group that a task makes for workers of its own."""
    return f"graftwork/{task}"


def free_group(task: str | None) -> None:
    """Give back what workers of a lost task still hold: its group stays until the job is over."""
    with suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(group_name(task)))


def free_group_of(ref: ray.ObjectRef) -> None:
    """The same, of the task that was to give this result."""
    free_group(ref.task_id().hex())


def settle() -> torch.device:
    """Set this process up for numerical work and return its device; raises UnusableGpu.

    On a CPU all work runs on one thread: how sums are split over threads changes their last bits, and steps run side
    by side as processes anyway.
    """
    end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"
    on_gpu = bool(ray.get_gpu_ids())
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed()
    import torch

    from graftwork.models.numerics.precision import allow_tf32

    torch.set_num_threads(1)
    allow_tf32(matrices=False, convolutions=False)  # fp32 unless a step's precision says otherwise
    return gpu() if on_gpu else torch.device("cpu")


def gpu() -> torch.device:
    """Return the GPU that Ray gave this process; raises UnusableGpu where torch cannot compute on it.

    Ray counts GPUs without asking torch. Going on would mean one core of the CPU beside an idle GPU.
    """
    import torch

    if (problem := gpu_problem()) is not None:
        raise UnusableGpu(f"Ray gave this task a GPU that {problem}")
    return torch.device("cuda")
