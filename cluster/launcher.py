"""Ray Train's launcher: the same function on several workers that form one torch.distributed group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.runtime import settle
from specs.job import StepResources

RESTARTS = 3  # of the whole group, when a worker is lost


def launch(work: Callable[[Any, torch.device], None], argument: Any, workers: int, resources: StepResources) -> None:
    """Run `work(argument, device)` on each of `workers` processes and wait; an error in the work is raised here."""

    def loop() -> None:
        work(argument, settle())

    for attempt in range(RESTARTS + 1):
        try:
            TorchTrainer(
                loop,
                scaling_config=ray.train.ScalingConfig(
                    num_workers=workers,
                    use_gpu=resources.gpu > 0,
                    resources_per_worker={"CPU": resources.cpu, "GPU": resources.gpu},
                ),
                torch_config=TorchConfig(backend="nccl" if resources.gpu > 0 else "gloo"),
                run_config=ray.train.RunConfig(storage_path=tempfile.mkdtemp(prefix="graftwork-train-")),
            ).fit()
            return
        except ray.train.WorkerGroupError as error:
            # Ray Train would start again after any error; only a lost worker deserves it.
            failures = error.worker_failures.values()
            raised = [failure for failure in failures if not type(failure).__module__.startswith("ray.")]
            if raised:
                # When one worker fails, the others see their connections break: the first cause is the telling one.
                raise min(raised, key=lambda cause: isinstance(cause, RuntimeError)) from error
            if attempt == RESTARTS:
                raise
