"""What Ray is asked and told."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from typing import Any

import pytest
import ray
import torch

from graftwork.cluster.session import runtime
from graftwork.specs.resources import StepResources


def test_a_task_whose_gpu_torch_cannot_use_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this GPU can be used")
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(runtime, "end_with_parent", lambda: None)
    with pytest.raises(runtime.UnusableGpu) as caught:
        runtime.settle()
    line = str(caught.value)
    assert "\n" not in line and torch.__version__ in line and "NVIDIA driver: " in line
    assert "accepted: a driver that supports that CUDA" in line


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "fast": 1.0}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 12),
        ({"cpu": 3}, 3),
        ({"gpu": 1}, 2),
        ({"gpu": 2}, 1),
        ({"gpu": 0.5, "cpu": 0}, 4),
        ({"gpu": 0.6}, 2),  # no task has what is left of two
        ({"gpu": 0.3, "cpu": 0}, 6),
        ({"custom": {"fast": 0.5}}, 2),
        ({"custom": {"slow": 1}}, 0),
    ],
    ids=str,
)
def test_room_is_how_many_tasks_living_nodes_hold(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    assert runtime.room_for(StepResources(**asked)) == expected


ORPHANS = """
import os
import time
import ray
from ray.util import placement_group
from graftwork.cluster.session import runtime

@ray.remote(num_cpus=0)
class Controller:
    def hold(self):
        assert placement_group([{"CPU": 1}]).wait(60)
        return os.getpid()

ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
lost, alive = Controller.remote(), Controller.remote()
process, _ = ray.get([lost.hold.remote(), alive.hold.remote()])
assert placement_group([{"CPU": 1}]).wait(60)  # the driver's own
assert runtime.free_orphaned_groups() == 0
os.kill(process, 9)
deadline = time.monotonic() + 60
while not runtime.free_orphaned_groups() and time.monotonic() < deadline:
    time.sleep(0.1)
while not ray.available_resources().get("CPU") and time.monotonic() < deadline:
    time.sleep(0.1)
print(ray.available_resources().get("CPU"), runtime.free_orphaned_groups())
"""


def test_what_a_lost_controller_held_is_freed_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1.0 0"  # Ray tells of the lost one before


FAULTS = """
import resource
import torch
from graftwork.cluster.memory import keep_freed

keep_freed()
for number in range(20):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(6 * 2**20) for _ in range(8)]  # 24 MiB each
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_the_memory_of_a_tensor_serves_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    round_of_pages = 8 * 24 * 2**20 // mmap.PAGESIZE
    assert int(done.stdout) < 2 * round_of_pages  # of the 19 rounds that asked for them
