"""The CPUs and the memory that a process may use: its affinity, and its control groups of either version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from graftwork.cluster import machine
from graftwork.pipeline.estimates import simulate
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.reading.load import load
from graftwork.specs.resources import StepResources
from graftwork.stages.distillation import sources
from tests.conftest import TINY

GIB = 2**30
CPUS = len(os.sched_getaffinity(0))
FIRST = {  # version 1, as a machine mounts it: a hierarchy a controller
    "cpu": "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
    "memory": "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
}
SECOND = "41 31 0:38 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def second(root: Path, groups: dict[str, dict[str, str]], own: str, mounted: str = "/") -> Path:
    """A made-up root folder in which version 2 is mounted. groups: files by their group's folder."""
    files = {f"sys/fs/cgroup{group}/{name}": text for group, had in groups.items() for name, text in had.items()}
    return write(root, files | {"proc/self/cgroup": f"0::{own}", "proc/self/mountinfo": SECOND.format(root=mounted)})


def first(root: Path, groups: dict[str, dict[str, str]], own: str, mounted: str = "/") -> Path:
    """The same with version 1."""
    files = {f"sys/fs/cgroup/{group}/{name}": text for group, had in groups.items() for name, text in had.items()}
    lines = "\n".join(line.format(root=mounted) for line in FIRST.values())
    return write(
        root, files | {"proc/self/cgroup": f"4:memory:{own}\n1:cpu,cpuacct:{own}", "proc/self/mountinfo": lines}
    )


def memory(limit: str, used: int, of_files: int) -> dict[str, str]:
    statistics = f"anon 5\ninactive_file {of_files}\nactive_file 7"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": statistics}


def old_memory(limit: int, used: int, of_files: int) -> dict[str, str]:
    statistics = f"inactive_file 1\ntotal_inactive_file {of_files}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": statistics}


def test_a_machine_without_control_groups_has_all_it_has(tmp_path: Path) -> None:
    assert machine.num_cpus(tmp_path) == CPUS
    assert machine.available_memory(tmp_path) > 0.5 * psutil.virtual_memory().available


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", CPUS), ("100000 100000", 1), ("150000 100000", 1), ("25000 100000", 1), ("6400000 100000", CPUS)],
)
def test_a_quota_of_version_2_is_kept(tmp_path: Path, quota: str, expected: int) -> None:
    assert machine.num_cpus(second(tmp_path, {"/": {"cpu.max": quota}}, own="/")) == expected


@pytest.mark.parametrize("quota", ["-1", "100000"])
def test_a_quota_of_version_1_is_kept(tmp_path: Path, quota: str) -> None:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    assert machine.num_cpus(first(tmp_path, {"cpu,cpuacct/job": files}, own="/job")) == (CPUS if quota == "-1" else 1)


def test_a_group_above_limits_those_in_it(tmp_path: Path) -> None:
    groups = {"/slice": {"cpu.max": "100000 100000", **memory(str(GIB), 0, 0)}, "/slice/job": {"cpu.max": "max 100000"}}
    root = second(tmp_path, groups, own="/slice/job")
    assert (machine.num_cpus(root), machine.available_memory(root)) == (1, GIB)


def test_a_group_beside_this_one_limits_nothing(tmp_path: Path) -> None:
    root = second(tmp_path, {"/other": {"cpu.max": "100000 100000", **memory("1", 0, 0)}}, own="/job")
    assert machine.num_cpus(root) == CPUS and machine.available_memory(root) > 1


@pytest.mark.parametrize("own", ["/docker/abc", "/", "/../outside"])
def test_a_container_s_own_group_is_where_it_is_mounted(tmp_path: Path, own: str) -> None:
    """Its path is that of the host, or, in a namespace of its own, the root's."""
    root = second(tmp_path, {"/": memory(str(GIB), GIB // 2, 0)}, own=own, mounted="/docker/abc")
    assert machine.available_memory(root) == GIB // 2
    files = {"memory": old_memory(GIB, GIB // 4, 0)}
    assert machine.available_memory(first(tmp_path / "old", files, own=own, mounted="/docker/abc")) == 3 * GIB // 4


def test_what_is_left_counts_what_the_kernel_gives_up_for_it(tmp_path: Path) -> None:
    root = second(tmp_path, {"/": memory(str(GIB), 900 * 2**20, 500 * 2**20)}, own="/")
    assert machine.available_memory(root) == GIB - 400 * 2**20
    old = first(tmp_path / "old", {"memory": old_memory(GIB, 900 * 2**20, 500 * 2**20)}, own="/")
    assert machine.available_memory(old) == GIB - 400 * 2**20
    assert machine.available_memory(second(tmp_path / "full", {"/": memory("10", 20, 0)}, own="/")) == 0
    assert machine.available_memory(second(tmp_path / "free", {"/": memory("max", 20, 0)}, own="/")) > 20


def test_a_limit_larger_than_the_machine_is_none(tmp_path: Path) -> None:
    root = first(tmp_path, {"memory": old_memory(9223372036854771712, 0, 0)}, own="/")
    assert machine.available_memory(root) <= psutil.virtual_memory().total


def asked(code: str, *before: str, preface: str = "") -> list[str]:
    """What a process of its own prints. before: the command that it runs under."""
    done = subprocess.run(
        [*before, sys.executable, "-c", preface + code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


ESTIMATE = """
from graftwork.cluster.machine import num_cpus
from graftwork.pipeline.estimates.simulate import machine_for
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.reading.load import load
plan = make_plan(load({job!r}, ["finetune.workers=1", "weights.workers=1"]))
print(num_cpus(), machine_for(plan, None).cpus)
"""


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_a_process_on_one_core_counts_and_expects_one() -> None:
    assert asked(ESTIMATE.format(job=str(TINY)), "taskset", "-c", "0") == ["1", "1.0"]


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group of version 1, below this process's own, with 1 GiB."""
    mine = next(
        (path for path in machine._groups("memory", machine.ROOT) if (path / "memory.limit_in_bytes").exists()), None
    )
    made = mine / f"graftwork-{os.getpid()}" if mine is not None else None
    if made is not None:
        with suppress(OSError):
            made.mkdir()
            (made / "memory.limit_in_bytes").write_text(str(GIB))
    if made is None or not made.is_dir():
        pytest.skip("may make no control group of version 1 here")
    yield made
    made.rmdir()


def test_a_process_in_a_real_control_group_has_its_limit(group: Path) -> None:
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    code = "from graftwork.cluster.machine import available_memory; print(available_memory())"
    (found,) = asked(code, preface=enter)
    assert 0.9 * GIB < int(found) <= GIB


def test_a_distillation_s_room_and_an_estimate_go_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "available_memory", lambda: 8 * GIB)
    monkeypatch.setattr(sources, "num_cpus", lambda: 4)
    monkeypatch.setattr(simulate, "num_cpus", lambda: 7)
    assert room_of("cpu") == 2 * GIB
    assert simulate.machine_for(make_plan(load(TINY)), None).cpus == 7


def test_the_gpus_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    assert machine.num_gpus(tmp_path) == 1
    for bus in ("0000:07:00.0", "0000:0f:00.0"):
        write(tmp_path, {f"proc/driver/nvidia/gpus/{bus}/information": "Model: H100"})
    assert machine.num_gpus(tmp_path) == 2


def room_of(place: str, **resources: float) -> float:
    """What a distillation with these resources may hold there, of all that is its own."""
    import torch

    step = next(step for step in make_plan(load(TINY)).steps if step.stage == "distill")
    context = SimpleNamespace(params=step.params, resources=StepResources(**resources))
    return sources.memory_budget(context, torch.device(place)) / sources.MEMORY_SHARE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "free", "cached", "expected"),
    [
        (1, 70, 0, 70),
        (1, 30, 40, 70),  # PyTorch keeps what the task before left
        (0.5, 80, 0, 40),
        (0.5, 58, 0, 40),  # a neighbour that came before has taken its part
        (0.25, 25, 5, 20),
        (0.25, 10, 0, 10),
        (2, 70, 0, 70),
    ],
)
def test_a_tasks_part_of_a_gpu_is_its_share_of_the_whole_card(
    monkeypatch: pytest.MonkeyPatch, gpu: float, free: int, cached: int, expected: int
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (cached + 3) * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    assert room_of("cuda", gpu=gpu) == expected * GIB


@pytest.mark.parametrize(("resources", "expected"), [({"gpu": 1}, 8), ({"gpu": 0.5, "cpu": 1}, 4), ({"cpu": 2}, 2)])
def test_the_host_is_divided_by_the_gpus_among_tasks_on_gpus(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], expected: int
) -> None:
    monkeypatch.setattr(sources, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr(sources, "num_cpus", lambda: 64)
    monkeypatch.setattr(sources, "num_gpus", lambda: 8)
    assert room_of("cpu", **resources) == expected * GIB
