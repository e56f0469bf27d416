"""A cluster that grows for a step, and one that loses a node under a training: on real nodes, on loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.training.group import TITLE
from graftwork.specs.resources import StepResources
from graftwork.specs.training import TrainingSpec
from tests.conftest import GRAFT, ROOT, TINY, Finished, keys
from tests.loopback import LoopbackCluster, free_port

# Ray's own stand-in for a cloud: its nodes are processes on this machine. It takes the head for a node of this type; by
# any other name the autoscaler misses its head, and starts and ends nodes of that type for ever.
HEAD = "ray.head.default"
NODES = {
    "cluster_name": "growing",
    "max_workers": 2,
    "provider": {"type": "fake_multinode"},
    "head_node_type": HEAD,
    "available_node_types": {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "judge": {"resources": {"CPU": 1, "judge": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 1,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}

LAUNCH = """
import sys
from pathlib import Path
import ray
import torch.distributed as dist
from graftwork.cluster.training import launcher
from graftwork.specs.resources import StepResources
from graftwork.specs.training import TrainingSpec

def work(folder, device):
    import time
    world = dist.get_world_size()
    total = __import__("torch").ones(())
    dist.all_reduce(total)
    (folder / f"world{world}-rank{dist.get_rank()}-{int(total)}").touch()
    while world == 2:
        time.sleep(0.1)

launcher.PATIENCE_SECONDS = 3.0
ray.init(log_to_driver=False, logging_level="ERROR")
launcher.launch(work, Path(sys.argv[1]), TrainingSpec(batch=4, workers=2, min_workers=1), StepResources())
"""


@pytest.mark.slow
def test_a_step_that_no_node_can_hold_has_the_autoscaler_bring_one(tiny: Finished, tmp_path: Path) -> None:
    store = tmp_path / ".graftwork"
    for step, key in keys(tiny.outcome).items():
        if step != "classifier":
            shutil.copytree(tiny.store / "artifacts" / key, store / "artifacts" / key)
    port, config = free_port(), tmp_path / "nodes.json"
    growing = {**NODES, "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"}}
    config.write_text(json.dumps(growing))
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(ROOT)}
    options = ("--autoscaling-config", str(config))
    with LoopbackCluster(workers=0, environment=environment, head_options=options, port=port) as cluster:
        assert cluster.alive() == 1
        done = subprocess.run(
            [GRAFT, "run", str(TINY), "--json", "--set", "resources.classifier={cpu: 1, custom: {judge: 1}}"],
            cwd=tmp_path,
            env=cluster.driver_environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr + cluster.logs()[-3000:]
        assert cluster.alive() == 2
    states = {step["name"]: step["state"] for step in json.loads(done.stdout)["steps"]}
    assert [name for name, state in states.items() if state == "done"] == ["classifier"]


@pytest.mark.slow
def test_a_training_goes_on_with_fewer_workers_when_a_node_is_lost(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    # By itself, Ray gives up a node that is silent for a minute or so.
    impatient = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}
    environment = {f"RAY_health_check_{name}": value for name, value in impatient.items()} | {"PYTHONPATH": str(ROOT)}
    with LoopbackCluster(workers=2, worker_cpus=1, environment=environment) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(seen)],
            env=cluster.driver_environment,
        )
        wait_for(lambda: len(names(seen)) == 2, driver)
        assert names(seen) == ["world2-rank0-2", "world2-rank1-2"]
        cluster.kill("worker1")
        assert driver.wait(200) == 0
    assert "world1-rank0-1" in names(seen)


@pytest.mark.slow
def test_a_training_goes_on_when_the_process_that_launched_it_is_lost(tiny: Finished, tmp_path: Path) -> None:
    store, found = tmp_path / ".graftwork", keys(tiny.outcome)
    for step, key in found.items():
        if step != "finetune":
            shutil.copytree(tiny.store / "artifacts" / key, store / "artifacts" / key)
    environment = {"PYTHONPATH": str(ROOT)}
    with LoopbackCluster(workers=1, worker_cpus=2, environment=environment) as cluster:
        driver = subprocess.Popen(
            [GRAFT, "run", str(TINY)], cwd=tmp_path, env=cluster.driver_environment, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: TITLE in cluster.running().values(), driver)  # they import for seconds yet
        (launcher,) = [process for process, title in cluster.running().items() if title == "finetune"]
        launcher.kill()
        _, told = driver.communicate(timeout=300)
        assert driver.returncode == 0, told
    path = f"artifacts/{found['finetune']}/model.safetensors"
    assert (store / path).read_bytes() == (tiny.store / path).read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("workers", "least", "batch", "counts"),
    [(8, None, 256, (8,)), (8, 5, 256, (8, 7, 6, 5)), (3, 1, 10, (3, 2, 1)), (3, 3, 9, (3,))],
)
def test_a_training_may_go_on_with_any_count_of_workers_down_to_the_least(
    workers: int, least: int | None, batch: int, counts: tuple[int, ...]
) -> None:
    assert TrainingSpec(workers=workers, min_workers=least, batch=batch).worker_counts() == counts


def test_a_steps_resources_reach_ray_by_its_names() -> None:
    from graftwork.cluster.session.runtime import node_amounts, options

    wanted = StepResources(cpu=2, gpu=0.25, memory="2GiB", custom={"judge": 1})
    assert options(wanted) == {"num_cpus": 2, "num_gpus": 0.25, "memory": 2 * 2**30, "resources": {"judge": 1}}
    assert options(wanted, idle=True) == {"num_cpus": 0}
    assert node_amounts(wanted) == {"CPU": 2, "GPU": 0.25, "memory": 2 * 2**30, "judge": 1}
