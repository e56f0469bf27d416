"""The launcher of trainings: the same function on several workers that form one torch.distributed group.

On CPUs the workers are tasks in processes that are there already (cluster.group); with GPUs Ray Train starts them
(cluster.ray_train). What happens after a loss is the same for both, and settled here.
"""

from __future__ import annotations

import time
from typing import Any

from graftwork.cluster.session.runtime import room_for
from graftwork.cluster.training import group
from graftwork.cluster.training.group import NoRoom, Work, WorkerLost
from graftwork.specs.resources import StepResources
from graftwork.specs.training import SharedBatch

RESTARTS = 3  # of the whole group, when a worker is lost
PATIENCE_SECONDS = 60.0  # for lost nodes to be replaced, before fewer workers go on


def launch(work: Work, argument: Any, recipe: SharedBatch, resources: StepResources, *, last: bool = False) -> None:
    """Run `work(argument, device)` on each of the recipe's workers and wait; an error in the work is raised here.

    When workers are lost all of them start again, which is for the work to go on from its last checkpoint. There may
    be fewer of them then, if the recipe has `min_workers` and the cluster no longer has room for all. last: no other
    work finds the processes again.
    """
    run, workers, losses = group.run_group, recipe.workers, 0
    if resources.gpu:
        from graftwork.cluster.training.ray_train import run_group as run  # slow to import
    while True:
        try:
            run(work, argument, workers, resources, last)
            return
        except NoRoom:  # there may be some day, and the driver tells that it is waited for
            pass
        except WorkerLost as error:
            losses += 1
            if losses > RESTARTS:
                raise error.__cause__ or error from None
        workers = _workers_that_fit(recipe, resources)


def _workers_that_fit(recipe: SharedBatch, resources: StepResources) -> int:
    """All that are wanted, once the cluster has room for them; else as many as it has room for, if that is enough."""
    wanted, *fewer = recipe.worker_counts()
    if not fewer:
        return wanted
    began = time.monotonic()
    while room_for(resources) < wanted:
        if time.monotonic() - began > PATIENCE_SECONDS:
            return next((count for count in fewer if count <= room_for(resources)), wanted)
        time.sleep(1)
    return wanted
