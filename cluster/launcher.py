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

    trainer = TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpu > 0,
            resources_per_worker={"CPU": resources.cpu, "GPU": resources.gpu},
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpu > 0 else "gloo"),
        run_config=ray.train.RunConfig(
            storage_path=tempfile.mkdtemp(prefix="graftwork-train-"),
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
        ),
    )
    trainer.fit()
