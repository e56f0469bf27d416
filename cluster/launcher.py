"""Ray Train's launcher: the same function on several workers that form one torch.distributed group."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.runtime import room_for, settle, taken
from specs.job import StepResources
from specs.training import TrainingSpec

RESTARTS = 3  # of the whole group, when a worker is lost
PATIENCE_SECONDS = 60.0  # for lost nodes to be replaced, before fewer workers go on


def launch(
    work: Callable[[Any, torch.device], None], argument: Any, recipe: TrainingSpec, resources: StepResources
) -> None:
    """Run `work(argument, device)` on each of the recipe's workers and wait; an error in the work is raised here.

    When workers are lost all of them start again, which is for the work to go on from its last checkpoint. There may
    be fewer of them then, if the recipe has `min_workers` and the cluster no longer has room for all.
    """

    def loop() -> None:
        work(argument, settle())

    workers, losses = recipe.workers, 0
    while True:
        try:
            _train(loop, workers, resources)
            return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:  # or its controller was lost
            _raise_own(error)
            # Not having room for all is no loss: there may be some day, and the driver tells that it is waited for.
            if not isinstance(error, ray.train.ControllerError) or room_for(resources) >= workers:
                losses += 1
            if losses > RESTARTS:
                raise
            workers = _workers_that_fit(recipe, resources)


def _train(loop: Callable[[], None], workers: int, resources: StepResources) -> None:
    """One attempt; what is done about a failure is for the caller to say."""
    # Steps see to being preempted themselves; a process less to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray Train insists on a place of its own; nothing of ours goes there.
    with tempfile.TemporaryDirectory(prefix="graftwork-train-", ignore_cleanup_errors=True) as folder:
        TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=resources.gpu > 0, resources_per_worker=taken(resources)
            ),
            torch_config=TorchConfig(backend="nccl" if resources.gpu > 0 else "gloo"),
            run_config=ray.train.RunConfig(
                storage_path=folder,
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        ).fit()


def _raise_own(error: Exception) -> None:
    """Raise what the work itself raised on some worker, if it did: that would only happen again."""
    failures = getattr(error, "worker_failures", {}).values()
    raised = [failure for failure in failures if not type(failure).__module__.startswith("ray.")]
    if raised:
        # When one worker fails, the others see their connections break: the first cause is the telling one.
        raise min(raised, key=lambda cause: isinstance(cause, RuntimeError)) from error


def _workers_that_fit(recipe: TrainingSpec, resources: StepResources) -> int:
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
