"""Items over a cluster: in order, some at a time, and none lost. Its GPUs are in name only: Ray counts them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.trivial import chain_and_fan
from benchmarks.watching import Unwatched
from graftwork.cluster.fan_out import AHEAD, fan_out
from graftwork.cluster.session import runtime
from graftwork.cluster.training import launcher
from graftwork.models.operators import kernels
from graftwork.pipeline.execution.scheduler import Execution
from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.reading.load import load
from graftwork.specs.resources import StepResources
from graftwork.specs.training import TrainingSpec
from tests.conftest import TINY

ON_CPU, ON_GPU = StepResources(cpu=1), StepResources(cpu=0, gpu=1)
BOTH = pytest.mark.parametrize("resources", [ON_CPU, ON_GPU], ids=["tasks", "staff"])
BOTH_SLOWLY = pytest.mark.parametrize(
    "resources", [ON_CPU, pytest.param(ON_GPU, marks=pytest.mark.slow)], ids=["tasks", "staff"]
)
SECONDS = 120


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each task that asks for its GPU leaves a file: which task, process and GPUs that is."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def cluster(notes: Path) -> Iterator[Cluster]:
    def gpus_in_name() -> None:
        import json
        import os
        import time
        import uuid

        import ray
        import torch

        from graftwork.cluster.session import runtime

        look = runtime.gpu

        def gpu() -> torch.device:
            task = ray.get_runtime_context().get_task_name()
            note = {"task": task, "process": os.getpid(), "gpus": ray.get_gpu_ids()}
            path = notes / f"{uuid.uuid4().hex}.json"
            path.with_suffix(".part").write_text(json.dumps(note))
            path.with_suffix(".part").rename(path)
            deadline = time.monotonic() + 60
            while (notes / "meet").exists() and len(list(notes.glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            return look() if (notes / "unusable").exists() else torch.device("cpu")

        runtime.gpu = gpu

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    hook = {"worker_process_setup_hook": gpus_in_name}
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False, runtime_env=hook)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


# Work is defined within the tests: Ray's workers need not find this file.


@BOTH
@pytest.mark.usefixtures("cluster")
def test_results_come_in_the_order_of_the_items_and_what_a_lost_worker_was_at_is_done_again(
    resources: StepResources, tmp_path: Path
) -> None:
    def work(shared: Path, item: int, device: object) -> tuple[int, str]:
        import os
        import signal
        import time

        first = shared / str(item)
        if item == 1 and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 if item == 0 else 0)
        return item, str(device)

    assert list(fan_out(work, tmp_path, range(5), resources)) == [(item, "cpu") for item in range(5)]
    assert (tmp_path / "1").exists()


@pytest.mark.usefixtures("cluster")
def test_which_kernels_the_staff_ran_is_known_to_whom_it_works_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(shared: None, item: int, device: object) -> int:
        from graftwork.models.operators import kernels

        kernels.remember("mha", "flash-attn", f"there is none, says {item}")
        return item

    monkeypatch.setattr(kernels, "DECISIONS", {("swa", "flash-attn", None)})
    assert list(fan_out(work, None, range(2), ON_GPU)) == [0, 1]
    told = {("mha", "flash-attn", f"there is none, says {item}") for item in range(2)}
    assert told | {("swa", "flash-attn", None)} == set(kernels.DECISIONS)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_which_kernels_the_first_worker_of_a_training_ran_is_known_to_its_task() -> None:
    """Ray Train without GPUs, where NCCL could not be."""

    def work(shared: None, device: object) -> None:
        import torch.distributed as dist

        from graftwork.models.operators import kernels

        kernels.remember("mha", "flash-attn", f"there is none, says {dist.get_rank()}")

    @ray.remote(num_cpus=0)
    def task() -> list[Any]:
        from graftwork.cluster.training.ray_train import run_group
        from graftwork.models.operators import kernels

        run_group(work, None, 2, ON_CPU)
        return list(kernels.DECISIONS)

    assert ray.get(task.remote()) == [("mha", "flash-attn", "there is none, says 0")]


@BOTH_SLOWLY
@pytest.mark.usefixtures("cluster")
def test_an_error_in_the_work_is_raised_at_once(resources: StepResources) -> None:
    def work(shared: None, item: int, device: object) -> int:
        if item == 1:
            raise ValueError("of the work's own")
        return item

    with pytest.raises(ValueError, match="of the work's own"):
        list(fan_out(work, None, range(3), resources))


@BOTH_SLOWLY
@pytest.mark.usefixtures("cluster")
def test_no_more_is_begun_than_is_taken(resources: StepResources, tmp_path: Path) -> None:
    def work(shared: Path, item: int, device: object) -> int:
        (shared / str(item)).touch()
        return item

    results = fan_out(work, tmp_path, range(100), resources)
    assert next(results) == 0
    time.sleep(3)
    assert len(list(tmp_path.iterdir())) <= AHEAD * 2 + 1
    assert list(results) == list(range(1, 100))


@pytest.mark.usefixtures("cluster")
def test_on_gpus_a_process_stays_for_many_items_and_goes_when_none_is_left() -> None:
    def work(shared: None, item: int, device: object) -> int:
        import os

        return os.getpid()

    assert len(set(fan_out(work, None, range(12), ON_GPU))) <= 2
    assert soon(lambda: ray.available_resources().get("GPU") == 2)


@pytest.mark.usefixtures("cluster")
def test_whoever_has_nothing_left_to_do_gives_its_gpu_back_before_the_others_are_done() -> None:
    def work(shared: None, item: int, device: object) -> bool:
        import time

        import ray

        deadline = time.monotonic() + 60
        while item == 0 and not ray.available_resources().get("GPU") and time.monotonic() < deadline:
            time.sleep(0.1)
        return time.monotonic() < deadline

    assert list(fan_out(work, None, range(2), ON_GPU)) == [True, True]


def with_torch() -> set[int]:
    """Processes of Ray's workers that have torch loaded, as whatever did a step has."""
    loaded = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("libtorch_cpu" in one.path for one in process.memory_maps()):
                loaded.add(process.pid)
    return loaded


def on_gpus(store: Store, gpu: float, steps: int) -> Plan:
    """So many steps that need nothing, each of which takes that much of a GPU."""
    plan = chain_and_fan(load(TINY, [f"store={store.root}"]), each=steps, warm=0, number=0)
    fan = [replace(step, needs={}) for step in plan.steps if step.name.startswith("fan/")]
    return replace(plan, steps=tuple(replace(step, resources=StepResources(cpu=0.5, gpu=gpu)) for step in fan))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("gpu", [0, 1])
def test_the_process_of_a_step_on_a_gpu_ends_with_it(store: Store, gpu: float) -> None:
    """Otherwise it keeps the GPU's memory, and the next step in it would compute on the GPU that was its first."""
    before = with_torch()
    assert not Execution(on_gpus(store, gpu, 3), store, "run", None, Unwatched()).go()
    left = with_torch() - before
    assert left if not gpu else soon(lambda: not with_torch() - before)


@pytest.fixture
def fresh(notes: Path) -> Iterator[Path]:
    """The folder of notes, without what other tests left."""
    for path in notes.iterdir():
        path.unlink()
    yield notes
    for path in notes.iterdir():
        path.unlink()


@pytest.mark.usefixtures("cluster")
def test_steps_side_by_side_have_a_gpu_and_a_process_each(store: Store, fresh: Path) -> None:
    (fresh / "meet").touch()  # none goes on before another has begun
    assert not Execution(on_gpus(store, 1, 4), store, "run", None, Unwatched()).go()
    told = [
        json.loads(path.read_text()) for path in sorted(fresh.glob("*.json"), key=lambda path: path.stat().st_ctime)
    ]
    assert sorted(note["task"] for note in told) == [f"fan/{index:04d}" for index in range(4)]
    assert len({note["process"] for note in told}) == 4
    assert sorted(note["gpus"] for note in told[:2]) == [[0], [1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
@pytest.mark.usefixtures("cluster")
def test_a_step_whose_gpu_torch_cannot_use_fails_in_one_line_and_leaves_nothing(store: Store, fresh: Path) -> None:
    (fresh / "unusable").touch()
    plan = on_gpus(store, 1, 1)
    (failure,) = Execution(plan, store, "run", None, Unwatched()).go()
    line = str(failure)
    assert line.startswith("step fan/0000 failed: ") and "\n" not in line
    assert f"torch {torch.__version__}" in line and "accepted: a driver that supports that CUDA" in line
    assert store.manifest(plan["fan/0000"].key) is None
    assert len(list(fresh.glob("*.json"))) == 1  # it was not tried again


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
@pytest.mark.usefixtures("cluster")
def test_a_training_whose_gpus_torch_cannot_use_fails_at_once_in_the_same_line(fresh: Path) -> None:
    """NCCL would say something else, which looks like a lost worker: the group would begin again, three times."""

    def work(argument: None, device: torch.device) -> None:
        raise ValueError("this is not to run")

    (fresh / "unusable").touch()
    with pytest.raises(runtime.UnusableGpu) as caught:
        launcher.launch(work, None, TrainingSpec(batch=4, workers=2), StepResources(cpu=0.5, gpu=1))
    assert f"torch {torch.__version__}" in str(caught.value) and "\n" not in str(caught.value)
    assert len(list(fresh.glob("*.json"))) == 2  # a look for each worker, and no second attempt

    def gpus_are_free() -> bool:
        runtime.free_orphaned_groups()  # as a driver does all the while
        return ray.available_resources().get("GPU") == 2

    assert soon(gpus_are_free)


@pytest.mark.slow
def test_a_node_that_joins_is_given_work(cluster: Cluster) -> None:
    def work(shared: Path, item: int, device: object) -> str:
        import time

        import ray

        time.sleep(0.2)
        return ray.get_runtime_context().get_node_id()

    results: Iterator[Any] = fan_out(work, None, range(1000), ON_GPU)
    homes = {next(results)}
    joined = cluster.add_node(num_cpus=0, num_gpus=1)
    deadline = time.monotonic() + SECONDS
    while len(homes) < 2 and time.monotonic() < deadline:
        homes.add(next(results))
    results.close()  # type: ignore[attr-defined]
    cluster.remove_node(joined)
    assert len(homes) == 2
