"""Training groups on CPUs: tasks in warm processes, all or none, started again when one is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BEGIN = """
import os, signal, sys, time
from pathlib import Path
import ray
import torch
import torch.distributed as dist
from cluster import launcher, runtime
from specs.job import StepResources
from specs.training import TrainingSpec

folder = Path(sys.argv[1])

def together():
    total = torch.ones(())
    dist.all_reduce(total)
    return int(total)

def note(folder, device):
    (folder / f"{time.monotonic_ns()}-{dist.get_rank()}").write_text(f"{os.getpid()} {together()}")

@ray.remote(num_cpus=0, max_retries=2)
def launch(work, folder, workers=2):
    launcher.launch(work, folder, TrainingSpec(batch=4, workers=workers), StepResources())

def tell(*said):
    print("told:", *said)

def noted():
    return [path.read_text().split() for path in sorted(folder.iterdir())]

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
"""


def run(code: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, str(folder)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    told = (line.partition("told: ") for line in done.stdout.splitlines())  # Ray says something, too
    return [said for _, ours, said in told if ours]


def test_groups_follow_each_other_in_the_same_processes_and_never_share_a_cpu(tmp_path: Path) -> None:
    told = run(
        """
ray.get(launch.remote(note, folder))
ray.get([launch.remote(note, folder) for _ in range(3)])  # two CPUs: one group at a time, and no two halves
ray.get(launch.remote(note, folder, workers=1))
tell(*{total for _, total in noted()}, len(noted()), len({pid for pid, _ in noted()}))
tell(ray.available_resources().get("CPU"))
""",
        tmp_path,
    )
    totals, processes = told[0].split()[:-2], int(told[0].split()[-1])
    assert sorted(totals) == ["1", "2"] and told[0].split()[-2] == "9"
    assert processes < 9  # what one group leaves, another takes
    assert told[1] == "2.0"


def test_a_worker_that_is_lost_in_a_collective_is_a_loss_and_not_an_error_of_its_peers(tmp_path: Path) -> None:
    told = run(
        """
def work(folder, device):
    attempt = len(list(folder.iterdir())) // 2
    note(folder, device)
    dist.barrier()
    if attempt == 0 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    together()

ray.get(launch.remote(work, folder))
tell(len(noted()))
""",
        tmp_path,
    )
    assert told == ["4"]


def test_what_the_work_raises_is_told_at_once_and_the_first_cause_of_it(tmp_path: Path) -> None:
    told = run(
        """
def work(folder, device):
    note(folder, device)
    if dist.get_rank() == 1:
        raise FloatingPointError("the loss is nan")
    together()

try:
    ray.get(launch.remote(work, folder))
except ray.exceptions.RayTaskError as error:
    tell(type(error.cause).__name__, error.cause)
tell(len(noted()))
""",
        tmp_path,
    )
    assert told == ["FloatingPointError the loss is nan", "2"]


def test_a_worker_that_is_lost_again_and_again_ends_the_step(tmp_path: Path) -> None:
    told = run(
        """
def work(folder, device):
    note(folder, device)
    os.kill(os.getpid(), signal.SIGKILL)

try:
    ray.get(launch.remote(work, folder, workers=1))
except ray.exceptions.RayTaskError as error:
    tell(type(error.cause).__name__)
tell(len(noted()))
""",
        tmp_path,
    )
    assert told == ["WorkerCrashedError", "4"]  # and three restarts


@pytest.mark.parametrize("who", ["retried", "given up"])
def test_a_launcher_that_is_lost_leaves_no_cpu_taken(tmp_path: Path, who: str) -> None:
    told = run(
        f"""
def work(folder, device):
    first = not list(folder.iterdir())
    together()
    note(folder, device)
    if first:
        time.sleep(60)

ref = launch.options(max_retries={2 if who == "retried" else 0}, name="step").remote(work, folder)
while len(noted()) < 2:
    time.sleep(0.1)
import psutil
(step,) = [one for one in psutil.Process().children(recursive=True) if one.cmdline()[:1] == ["ray::step"]]
step.kill()
try:
    ray.get(ref)
    tell("went on", len(noted()))
except ray.exceptions.RayError:
    runtime.free_group(ref.task_id().hex())
    tell("lost", len(noted()))
deadline = time.monotonic() + 30
while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
    time.sleep(0.1)
tell(ray.available_resources().get("CPU"))
""",
        tmp_path,
    )
    assert told == (["went on 4", "2.0"] if who == "retried" else ["lost 2", "2.0"])


def test_two_trainings_by_deepspeed_follow_each_other_in_a_process(tmp_path: Path) -> None:
    told: Any = run(
        """
import cluster.sharded  # so that nothing of it is pickled by value
def train(folder, device):
    from cluster.sharded import ShardedEngine
    from specs.training import FinetuneSpec
    from tests.tiny_training import TINY, lively
    from models.dit import DiT
    for zero in (2, 3):
        recipe = FinetuneSpec(steps=2, batch=4, lr=1e-2, workers=dist.get_world_size(), deepspeed={"zero": zero})
        engine = ShardedEngine(lively(DiT(TINY)), recipe, None)
        x = torch.ones(2, 1, 8, 8)
        for _ in range(2):
            engine.step(engine(x, torch.ones(2).long(), torch.ones(2).long()).square().mean(), 1e-2)
        total = sum(value.double().sum().item() for value in engine.state().values())
        (folder / f"{time.monotonic_ns()}-{dist.get_rank()}").write_text(f"{os.getpid()} {zero}:{total!r}")

for workers in (2, 2, 1, 2):
    ray.get(launch.remote(train, folder, workers))
tell(len(noted()), len({pid for pid, _ in noted()}), len({total for _, total in noted()}))
""",
        tmp_path,
    )
    count, processes, sums = map(int, told[-1].split())
    assert count == 14 and processes < 7
    assert sums == 4  # one for each ZeRO stage and number of workers
