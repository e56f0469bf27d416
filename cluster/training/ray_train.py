"""A training group on GPUs, started by Ray Train: it shares out a node's devices and sets NCCL up.

The process of a GPU task is a fresh one in any case, so that what Ray Train starts beside it costs little.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from graftwork.cluster.session.runtime import UnusableGpu, gpu, node_amounts, room_for, settle
from graftwork.cluster.training.group import NoRoom, Work, WorkerLost, cause_of
from graftwork.models.operators.kernels import DECISIONS, Decision
from graftwork.specs.resources import StepResources


def run_group(work: Work, argument: Any, workers: int, resources: StepResources, last: bool = False) -> None:
    """As cluster.group.run_group; no process is ever found again.

    Which kernels the first worker ran is added to this process's decisions.
    """

    def loop() -> set[Decision]:
        from graftwork.models.operators import kernels  # the worker's own

        work(argument, settle())
        return kernels.DECISIONS

    try:
        DECISIONS.update(_fit(loop, workers, resources))
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:  # or its controller was lost
        if (unusable := _unusable_gpu(error)) is not None:
            raise unusable from error
        failures = list(getattr(error, "worker_failures", {}).values())
        own = [failure for failure in failures if not type(failure).__module__.startswith("ray.")]
        if own and len(own) == len(failures):
            raise cause_of(own) from error
        if isinstance(error, ray.train.ControllerError) and room_for(resources) < workers:
            raise NoRoom from error
        raise WorkerLost(str(error)) from error


class _GpuFirst(TorchConfig().backend_cls):  # type: ignore[misc]  # which has no types
    """Looks at each worker's GPU before NCCL does, which would say less and seem a lost worker.

    A group that does not come up takes nothing.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            worker_group.execute(gpu)
            super().on_start(worker_group, backend_config)
        except Exception:
            worker_group.abort()  # Ray would keep it, with all its GPUs, as long as the driver lives
            raise


class _Config(TorchConfig):  # type: ignore[misc]
    backend_cls = _GpuFirst


def _unusable_gpu(error: Exception) -> UnusableGpu | None:
    """Return what `gpu` raised in a worker; None if the training failed of something else."""
    failure = getattr(error, "controller_failure", None)
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, UnusableGpu) else None


def _fit(loop: Any, workers: int, resources: StepResources) -> Any:
    """Return what the first worker does, of one attempt; what is done about a failure is for the launcher to say."""
    # Steps see to being preempted themselves; a process less to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray Train insists on a place of its own; nothing of ours goes there.
    with tempfile.TemporaryDirectory(prefix="graftwork-train-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=resources.gpu > 0, resources_per_worker=node_amounts(resources)
            ),
            torch_config=_Config(backend="nccl" if resources.gpu else "gloo"),
            run_config=ray.train.RunConfig(
                storage_path=folder,
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        return trainer.fit().return_value
