"""How long a launch of training workers takes: from the start of a step's task to its first step, gradients and all.

python -m benchmarks.launching [--rounds 3] [--ray-train]

For one worker and for two, a finetune of a tiny DiT by DeepSpeed: the first launch of a session, and those after it.
--ray-train: the same through Ray Train, as trainings with GPUs are launched.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from benchmarks.command_line import bare_parser
from graftwork.cluster.session import runtime
from graftwork.pipeline.execution.scheduler import WARM
from graftwork.specs.resources import StepResources
from graftwork.specs.training import FinetuneSpec

PAUSE_SECONDS = 3.0  # between launches, as between a job's steps


def one_step(folder: Path, _: Any, device: torch.device) -> None:
    """One worker's part: its engine, one step, and the moment at which that was over."""
    import torch.distributed as dist

    from graftwork.cluster.training.deepspeed_engine import ShardedEngine
    from graftwork.models.condition import Condition
    from graftwork.models.rootstocks.dit import DiT, DiTConfig

    workers = dist.get_world_size()
    model = DiT(DiTConfig(input_size=16, in_channels=1, patch=2, depth=4, width=32, heads=2, num_classes=10))
    model.initialise()
    engine = ShardedEngine(model.to(device), FinetuneSpec(steps=1, batch=16, workers=workers), None)
    x, t, y = (
        torch.zeros(16 // workers, 1, 16, 16),
        torch.zeros(16 // workers).long(),
        torch.zeros(16 // workers).long(),
    )
    engine.step(engine(x, t, Condition(labels=y)).square().mean(), 1e-4)
    if dist.get_rank() == 0:
        (folder / "done").write_text(str(time.time()))


@ray.remote(num_cpus=0)
def launch(folder: Path, workers: int, ray_train: bool) -> float:
    """As a step's task does it; returns the seconds to the first step."""
    began = time.time()
    if ray_train:
        from graftwork.cluster.training.ray_train import run_group
    else:
        from graftwork.cluster.training.group import run_group
    run_group(partial(one_step, folder), None, workers, StepResources(), last=True)
    return float((folder / "done").read_text()) - began


def main() -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray-train", action="store_true")
    options = parser.parse_args()
    print("workers  first launch  later ones (median)   seconds")
    for workers in (1, 2):
        with (
            TemporaryDirectory() as folder,
            runtime.session([], min_parallel=2, warm=() if options.ray_train else WARM),
        ):
            took = []
            for _ in range(options.rounds + 1):
                took.append(ray.get(launch.remote(Path(folder), workers, options.ray_train)))
                time.sleep(PAUSE_SECONDS)
            print(f"{workers:7d}  {took[0]:12.2f}  {statistics.median(took[1:]):19.2f}")


if __name__ == "__main__":
    main()
