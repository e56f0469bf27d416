"""Items over a cluster: in order, some at a time, and none lost. Its GPUs are in name only: Ray counts them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from graftwork.cluster.fan_out import AHEAD, fan_out
from graftwork.specs.job import StepResources

ON_CPU, ON_GPU = StepResources(cpu=1), StepResources(cpu=0, gpu=1)
BOTH = pytest.mark.parametrize("resources", [ON_CPU, ON_GPU], ids=["tasks", "staff"])
BOTH_SLOWLY = pytest.mark.parametrize(
    "resources", [ON_CPU, pytest.param(ON_GPU, marks=pytest.mark.slow)], ids=["tasks", "staff"]
)
SECONDS = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
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
