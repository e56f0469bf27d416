"""A training group on CPUs: a Ray task a worker, all of which form one torch.distributed group.

Tasks run in processes that are there already, with torch and DeepSpeed loaded by what ran in them before. Ray Train
(cluster.launcher) starts four processes for two workers and has each import everything: 17 to 25 s on two cores, where
this takes a second or two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # handed on without saying so

from graftwork.cluster import memory
from graftwork.cluster.session.runtime import free_group, group_name, node_amounts, options, room_for, settle
from graftwork.specs.resources import StepResources

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

POLL_SECONDS = 1.0
ROOM_SECONDS = 60.0  # to wait for nodes with room for all workers, before the caller thinks again
GRACE_SECONDS = 10.0  # after the first worker has failed, for the others to notice
TITLE = "training"  # of a worker's process
RETURN_SECONDS = 0.1  # for Ray to have the processes back before their room goes, and they with it
TIMEOUT = timedelta(minutes=30)  # of a collective
# In what gloo (which raises RuntimeError) and sockets say when a peer is gone.
BROKEN_CONNECTION = ("gloo", "NCCL", "Connection reset", "Connection closed", "Connection refused", "Broken pipe")

Work = Callable[[Any, "torch.device"], None]


class NoRoom(Exception):
    """The cluster's nodes have no room for all workers at once, whatever else runs on them."""


class WorkerLost(Exception):
    """A worker's process or node is gone."""


def run_group(work: Work, argument: Any, workers: int, resources: StepResources, last: bool = False) -> None:
    """Run `work(argument, device)` on so many workers at once and wait for all of them.

    last: the processes end with the work, which leaves something in them that no other may find.

    Raises WorkerLost where a process or a node went, whatever the others made of that; else what the work itself
    raised; NoRoom where the workers had to be waited for too long.
    """
    # The rendezvous is here and not at a worker: no port is agreed on beforehand, which another might take.
    store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    with _room_for(workers, resources) as room:
        shared, worker = ray.put((work, argument)), _last_training if last else _training
        refs = [
            worker.options(
                name=TITLE,
                **options(resources),
                scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank),
            ).remote(shared, rank, workers, store.host, store.port)
            for rank in range(workers)
        ]
        try:
            _wait(refs)
        except BaseException:
            for ref in refs:
                ray.cancel(ref, force=True)
            raise
        time.sleep(RETURN_SECONDS)


def _wait(refs: list[Any]) -> None:
    """Until all workers have ended well, or one has failed and the others have had the time to."""
    running, errors = list(refs), list[Exception]()
    while running:
        ended, running = ray.wait(running, timeout=GRACE_SECONDS if errors else None)
        if not ended:
            break
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            errors.append(error)
    lost = [error for error in errors if not isinstance(error, ray.exceptions.RayTaskError)]
    if lost:
        raise WorkerLost(str(lost[0])) from lost[0]
    if errors:
        raise cause_of([getattr(error, "cause", error) for error in errors]) from errors[0]


def cause_of(errors: Sequence[Exception]) -> Exception:
    """The error of the work itself among those that workers raised; WorkerLost if all of them are broken connections.

    When one worker fails or is lost, the others fail in their collective. They may do so minutes before Ray knows that
    a node is gone.
    """
    own = [error for error in errors if not is_broken_connection(error)]
    return own[0] if own else WorkerLost(str(errors[0]))


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another worker, as gloo, NCCL or torch's store report it.

    For want of memory it fails by itself, and would again.
    """
    if memory.is_short(error):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in BROKEN_CONNECTION)


@contextmanager
def _room_for(workers: int, resources: StepResources) -> Iterator[PlacementGroup]:
    """Room for all workers at once, so that two groups do not wait for each other's half."""
    task = ray.get_runtime_context().get_task_id()
    free_group(task)  # of an earlier attempt of this very task
    room = placement_group([_bundle(resources)] * workers, name=group_name(task))
    try:
        enough = time.monotonic()
        while not room.wait(POLL_SECONDS):
            if room_for(resources) >= workers:  # others have it for now
                enough = time.monotonic()
            elif time.monotonic() - enough > ROOM_SECONDS:
                raise NoRoom
        yield room
    finally:
        remove_placement_group(room)


def _bundle(resources: StepResources) -> dict[str, float]:
    return {name: amount for name, amount in node_amounts(resources).items() if amount}


def _worker(shared: tuple[Work, Any], rank: int, workers: int, host: str, port: int) -> None:
    work, argument = shared
    device = settle()
    # As torch's own launchers set them, for who asks; CPUs are not numbered.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": "0"}
    store = TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=TIMEOUT)
    try:
        work(argument, device)
    finally:
        dist.destroy_process_group()


@ray.remote(max_retries=0)
def _training(*args: Any) -> None:
    _worker(*args)


@ray.remote(max_retries=0, max_calls=1)  # Ray ends the process after it
def _last_training(*args: Any) -> None:
    _worker(*args)
