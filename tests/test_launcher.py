"""Training groups on CPUs: tasks in warm processes, all or none, started again when one is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from graftwork.cluster.session import runtime
from graftwork.cluster.training import group, launcher
from graftwork.models.condition import Condition
from graftwork.models.rootstocks.dit import DiT
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.resources import StepResources
from graftwork.specs.training import FinetuneSpec, TrainingSpec
from graftwork.stages.training.loop import CHECKPOINT, train
from tests.tiny_training import (
    RECIPE,
    TINY,
    Reports,
    assert_same_bits,
    lively,
    make_data,
    run_training,
    state_of,
)

SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(os, "cpu_count", lambda: 2)
        with runtime.session(
            [], min_parallel=2, warm=("torch", "graftwork.cluster.training.deepspeed_engine", "torch._dynamo")
        ):
            yield


@pytest.fixture(autouse=True)
def all_cpus_are_given_back() -> Iterator[None]:
    yield
    wait_for(lambda: ray.available_resources().get("CPU") == 2)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ray.remote(num_cpus=0)
def launch(work: Any, folder: Any, workers: int = 2, last: bool = False) -> None:
    """As a step's task does."""
    launcher.launch(work, folder, TrainingSpec(batch=4, workers=workers), StepResources(), last=last)


def total() -> int:
    value = torch.ones(())
    dist.all_reduce(value)
    return int(value)


def note(folder: Path, device: torch.device) -> None:
    (folder / f"{time.monotonic_ns()}-{dist.get_rank()}").write_text(f"{os.getpid()} {total()}")


def noted(folder: Path) -> list[tuple[str, str]]:
    return [tuple(path.read_text().split()) for path in sorted(folder.iterdir())]  # type: ignore[misc]


def test_groups_follow_each_other_in_the_same_processes_and_wait_for_each_other(tmp_path: Path) -> None:
    ray.get(launch.remote(note, tmp_path, 1))
    ray.get(launch.remote(note, tmp_path))
    ray.get([launch.remote(note, tmp_path) for _ in range(3)])  # two CPUs: one group at a time, and no two halves
    assert [total for _, total in noted(tmp_path)] == ["1"] + 8 * ["2"]
    assert len({process for process, _ in noted(tmp_path)}) < 9  # what one group leaves, another takes


def lost_in_a_collective(folder: Path, device: torch.device) -> None:
    first = not list(folder.iterdir())
    note(folder, device)
    dist.barrier()
    if first and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    total()


def test_a_worker_that_is_lost_in_a_collective_is_a_loss_and_not_an_error_of_its_peers(tmp_path: Path) -> None:
    ray.get(launch.remote(lost_in_a_collective, tmp_path))
    assert len(noted(tmp_path)) == 4


def trained(task: tuple[Path, str, bool], device: torch.device) -> None:
    """Train as a stage does; the second worker may be killed once, in a collective after a checkpoint."""
    folder, stage, dies = task
    store = Store(str(folder / "store"))
    partial, died = store.partial("lost" if dies else "straight"), folder / "died"
    saved = folder / "store/partial/lost" / f"{CHECKPOINT}.json"
    all_reduce = dist.all_reduce

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if saved.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return all_reduce(*args, **kwargs)

    if dies and dist.get_rank() == 1 and not died.exists():
        dist.all_reduce = deadly
    if stage == "base":
        run_training(partial, make_data())
    elif stage == "search":
        from tests.test_search import run_search

        run_search(partial)
    else:
        from graftwork.cluster.training.deepspeed_engine import ShardedEngine

        recipe = FinetuneSpec(**RECIPE.model_dump() | {"workers": 2})
        engine = lambda state: ShardedEngine(lively(DiT(TINY)), recipe, state)  # noqa: E731
        train(engine, make_data(), recipe, seed=0, stream="finetune", partial=partial, report=Reports())


@pytest.mark.parametrize(
    "stage", ["base", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("search", "finetune"))]
)
def test_a_worker_killed_in_a_collective_costs_a_training_no_bit(tmp_path: Path, stage: str) -> None:
    for dies in (False, True):
        ray.get(launch.remote(trained, (tmp_path, stage, dies), last=True))
    assert (tmp_path / "died").exists()
    store = Store(str(tmp_path / "store"))
    assert_same_bits(state_of(store.partial("lost")), state_of(store.partial("straight")))


def silent_in_a_collective(folder: Path, device: torch.device) -> None:
    first = not list(folder.iterdir())
    note(folder, device)
    dist.barrier()
    if first and dist.get_rank() == 1:
        dist.destroy_process_group()
        time.sleep(SECONDS)
    total()


def test_a_connection_that_breaks_before_ray_knows_of_a_loss_is_one(tmp_path: Path) -> None:
    """A node that loses its power is missed by its peers at once, and by Ray after a while."""
    ray.get(launch.remote(silent_in_a_collective, tmp_path))
    assert len(noted(tmp_path)) == 4


OWN = torch.cuda.OutOfMemoryError("CUDA out of memory")
NO_MEMORY = dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")], None),
        ([dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited")], None),
        ([dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error")], None),
        ([RuntimeError("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=17)")], None),
        ([dist.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.")], None),
        ([dist.DistNetworkError("The client socket has failed to connect to 10.0.0.7:29500")], None),
        ([dist.DistBackendError("NCCL communicator was aborted on rank 1"), OWN], OWN),
        ([dist.DistBackendError("NCCL communicator was aborted on rank 1"), NO_MEMORY], NO_MEMORY),
    ],
    ids=["gloo", "NCCL", "remote", "watchdog", "clients", "store", "own", "NCCL's own"],
)
def test_a_broken_connection_is_not_the_work_s_own_error(errors: list[Exception], expected: Exception | None) -> None:
    cause = group.cause_of(errors)
    assert cause is expected if expected else isinstance(cause, group.WorkerLost)


def diverging(folder: Path, device: torch.device) -> None:
    note(folder, device)
    if dist.get_rank() == 1:
        raise FloatingPointError("the loss is nan")
    total()


def test_what_the_work_raises_is_told_at_once_and_the_first_cause_of_it(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        ray.get(launch.remote(diverging, tmp_path))
    assert len(noted(tmp_path)) == 2


def hopeless(folder: Path, device: torch.device) -> None:
    note(folder, device)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_lost_again_and_again_ends_the_step(tmp_path: Path) -> None:
    with pytest.raises(ray.exceptions.RayTaskError) as failed:
        ray.get(launch.remote(hopeless, tmp_path, 1))
    assert isinstance(failed.value.cause, ray.exceptions.WorkerCrashedError)
    assert len(noted(tmp_path)) == 1 + launcher.RESTARTS


def long_at_first(folder: Path, device: torch.device) -> None:
    first = not list(folder.iterdir())
    dist.barrier()
    note(folder, device)
    if first:
        time.sleep(SECONDS)


@pytest.mark.parametrize("retries", [2, 0])
def test_a_launcher_that_is_lost_leaves_no_cpu_taken(tmp_path: Path, retries: int) -> None:
    ref = launch.options(max_retries=retries, name="step").remote(long_at_first, tmp_path)
    wait_for(lambda: len(noted(tmp_path)) == 2)
    everyone = psutil.Process().children(recursive=True)
    (step,) = [process for process in everyone if process.cmdline()[:1] == ["ray::step"]]
    step.kill()
    if retries:
        ray.get(ref)
    else:
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(ref)
        runtime.free_group_of(ref)
    assert len(noted(tmp_path)) == (4 if retries else 2)


def finetuned(folder: Path, device: torch.device) -> None:
    from graftwork.cluster.training.deepspeed_engine import ShardedEngine

    for zero in (2, 3):
        recipe = FinetuneSpec(steps=2, batch=4, lr=1e-2, workers=dist.get_world_size(), deepspeed={"zero": zero})
        engine = ShardedEngine(lively(DiT(TINY)), recipe, None)
        x, t = torch.ones(2, 1, 8, 8), torch.ones(2).long()
        condition = Condition(labels=torch.ones(2).long())
        for _ in range(2):
            engine.step(engine(x, t, condition).square().mean(), 1e-2)
        state = engine.state()
        if dist.get_rank() == 0:  # the only one that gets it
            found = sum(value.double().sum().item() for value in state.values())
            (folder / f"{time.monotonic_ns()}").write_text(f"{dist.get_world_size()} {zero}:{found!r}")


def test_trainings_by_deepspeed_find_nothing_of_each_other(tmp_path: Path) -> None:
    for workers in (2, 1, 2):
        ray.get(launch.remote(finetuned, tmp_path, workers, last=True))
    found = noted(tmp_path)
    assert len(found) == 6 and len(set(found)) == 4  # one result for each ZeRO stage and number of workers
