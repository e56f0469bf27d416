"""What is in cluster/ for Kubernetes, a cloud and Slurm: checked as far as can be without any of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from typer.testing import CliRunner

import graftwork
from graftwork.pipeline.cli.app import app
from graftwork.specs.reading.load import load
from tests.conftest import ROOT, TINY, Finished
from tests.loopback import LOOPBACK, OBJECT_STORE_BYTES, PYTHON_BIN, RAY_START, free_port

CLUSTER = ROOT / "cluster"
RAYCLUSTER, RAYJOB = CLUSTER / "kuberay" / "raycluster.yaml", CLUSTER / "kuberay" / "rayjob.yaml"
RAY_UP, SLURM, DOCKERFILE = CLUSTER / "ray-up.yaml", CLUSTER / "slurm.sh", CLUSTER / "Dockerfile"
PLAYED = [RAYCLUSTER, RAYJOB, RAY_UP, SLURM, DOCKERFILE]

# What KubeRay's CRDs (ray.io/v1) have and require, of all that we use.
CLUSTER_FIELDS = {
    "headGroupSpec": True,
    "workerGroupSpecs": False,
    "rayVersion": False,
    "enableInTreeAutoscaling": False,
    "autoscalerOptions": False,
}
GROUP_FIELDS = {"rayStartParams": True, "template": True}
WORKER_FIELDS = {**GROUP_FIELDS, "groupName": True, "minReplicas": True, "maxReplicas": True, "replicas": False}
JOB_FIELDS = {
    "entrypoint": False,
    "submissionMode": False,
    "backoffLimit": False,
    "shutdownAfterJobFinishes": False,
    "ttlSecondsAfterFinished": False,
    "submitterPodTemplate": False,
    "rayClusterSpec": False,
}


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def cluster_spec(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = read(path)["spec"]
    return spec if path == RAYCLUSTER else dict(spec["rayClusterSpec"])


def pods(path: Path) -> list[dict[str, Any]]:
    spec = cluster_spec(path)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    submitter = [read(path)["spec"]["submitterPodTemplate"]] if path == RAYJOB else []
    return [one["template"]["spec"] for one in groups] + [one["spec"] for one in submitter]


def fits(section: dict[str, Any], fields: dict[str, bool]) -> bool:
    return section.keys() <= fields.keys() and {name for name, needed in fields.items() if needed} <= section.keys()


@pytest.mark.parametrize(("path", "kind"), [(RAYCLUSTER, "RayCluster"), (RAYJOB, "RayJob")])
def test_a_kuberay_manifest_has_the_fields_of_its_crd(path: Path, kind: str) -> None:
    document = read(path)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    if kind == "RayJob":
        assert fits(document["spec"], JOB_FIELDS)
    spec = cluster_spec(path)
    assert fits(spec, CLUSTER_FIELDS) and spec["enableInTreeAutoscaling"] is True
    assert fits(spec["headGroupSpec"], GROUP_FIELDS)
    for group in spec["workerGroupSpecs"]:
        assert fits(group, WORKER_FIELDS)
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # map[string]string


@pytest.mark.parametrize("path", [RAYCLUSTER, RAYJOB])
def test_every_container_is_complete_and_has_the_token_from_a_secret(path: Path) -> None:
    spec = cluster_spec(path)
    containers = [container for pod in pods(path) for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for container in [*containers, spec["autoscalerOptions"]]:
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}
    for pod in pods(path):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert "num-cpus" in spec["headGroupSpec"]["rayStartParams"]  # the head has no work of its own


@pytest.mark.parametrize("path", [RAYCLUSTER, RAYJOB])
def test_pods_with_gpus_may_go_where_gpus_are_and_have_shared_memory_for_all_of_them(path: Path) -> None:
    """Most clouds taint nodes with GPUs; Ray's objects and NCCL take shared memory, of which a pod has 64 MiB."""
    found = {}
    for group in cluster_spec(path)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        (volume,) = pod["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        memory, shared = (int(size.removesuffix("Gi")) for size in (limits["memory"], volume["emptyDir"]["sizeLimit"]))
        assert volume["emptyDir"]["medium"] == "Memory" and 0.3 * memory <= shared < memory  # Ray's share is 30%
        found[group["groupName"]] = int(limits["nvidia.com/gpu"]), group["rayStartParams"]
    assert found.pop("gpu") == (1, {})
    num_gpus, settings = found.pop("training")
    assert num_gpus == 8 and not found
    assert json.loads(json.loads(settings["resources"])) == {"nvlink": num_gpus}  # quoted for KubeRay's shell


@pytest.mark.parametrize("path", [RAYCLUSTER, RAYJOB])
def test_the_resources_at_the_top_of_a_kuberay_manifest_are_those_of_a_job(path: Path) -> None:
    text = path.read_text().replace("\n# ", " ")
    ((stage, resources),) = re.findall(r"`(\w+): (\{.*?\})`", text)
    job = load(TINY, [f"resources.{stage}={resources}", f"{stage}.workers=8", f"{stage}.batch=8"])
    assert job.resources.model_dump()[stage]["custom"] == {"nvlink": 1}


def test_the_ray_up_file_is_one_by_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(RAY_UP)))
    with pytest.raises(Exception, match="max_worker'"):
        validate_config({**prepare_config(read(RAY_UP)), "max_worker": 1})
    types = read(RAY_UP)["available_node_types"]
    assert all(one["node_config"]["ImageId"] for one in types.values())  # Ray's default has a driver of 2023
    assert read(RAY_UP)["head_node_type"] in types and types["gpu"]["max_workers"] > types["gpu"]["min_workers"]


def test_all_of_them_have_the_ray_and_the_version_of_this_project() -> None:
    version = graftwork.__version__
    for path in (RAYCLUSTER, RAYJOB):
        assert cluster_spec(path)["rayVersion"] == ray.__version__
        assert all(one["image"].endswith(f":{version}") for pod in pods(path) for one in pod["containers"])
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    assert versions["ray"] == ray.__version__
    cuda = versions["cuda-toolkit"].split(".")[0]
    for path in (DOCKERFILE, RAY_UP):  # an image with another CUDA than torch's could compile no kernels
        (image,) = re.findall(r"rayproject/ray:(\S+)", path.read_text())
        assert re.fullmatch(rf"{re.escape(ray.__version__)}-py311-cu{cuda}\d", image)


def test_the_image_has_the_kernels_at_the_versions_of_the_project() -> None:
    steps = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    (scan,) = [step for step in steps if step.endswith(" mamba-ssm")]
    assert "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE" in scan and "--constraint constraints.txt" in scan
    (convolution,) = [step for step in steps if "causal-conv1d==" in step]
    assert convolution.split()[-1] in (ROOT / "constraints-gpu.txt").read_text().splitlines()
    for step in (scan, convolution):  # else pip builds them against the newest torch, whatever is installed
        assert "--no-build-isolation --no-deps" in step


def test_the_image_has_every_package_of_the_project() -> None:
    copied = set(re.findall(r"^COPY --chown=\S+ (\w+) \1$", DOCKERFILE.read_text(), flags=re.MULTILINE))
    assert copied == {"graftwork", "specs", "models", "cluster", "stages", "pipeline"}


@pytest.mark.parametrize("path", PLAYED, ids=lambda path: path.name)
def test_each_says_at_its_top_how_it_is_used(path: Path) -> None:
    first = path.read_text().removeprefix("#!/usr/bin/env bash\n")
    top = first[: re.search(r"^[^#]", first, flags=re.MULTILINE).start()]  # type: ignore[union-attr]
    assert str(path.relative_to(ROOT)) in top
    assert str(path.relative_to(ROOT)) in (ROOT / "docs" / "cluster.md").read_text()


def commands() -> list[list[str]]:
    """Every `graft ...` that these files name, as arguments."""
    texts = [path.read_text().replace("\\\n#", "") for path in PLAYED]
    lines = [re.sub(r"^#\s*|>>.*$", "", line).strip() for text in texts for line in text.splitlines()]
    found = [shlex.split(line)[1:] for line in lines if re.match(r"graft [a-z]+ \S*(JOB|\$@)", line)]
    return [*found, shlex.split(read(RAYJOB)["spec"]["entrypoint"])[3:]]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:40])
def test_the_graft_commands_in_them_are_commands(command: list[str]) -> None:
    options = [word for word in command if word.startswith("--")]
    helped = CliRunner().invoke(app, [command[0], "--help"], terminal_width=200)
    assert helped.exit_code == 0 and all(option in helped.output for option in options)


def test_there_are_commands_to_check() -> None:
    assert {command[0] for command in commands()} == {"submit", "run"}


def test_nodes_of_a_slurm_job_are_not_bound_to_a_core() -> None:
    started = [line for line in SLURM.read_text().splitlines() if "srun --overlap" in line]
    assert started and all("--cpu-bind=none" in line for line in started)


def test_the_slurm_script_is_sound_bash() -> None:
    for checker in (["bash", "-n"], [str(PYTHON_BIN / "shellcheck")]):
        checked = subprocess.run([*checker, str(SLURM)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


# Stand-ins for what a Slurm cluster has: nodes with names, all of them this machine.
SRUN = f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || node=${{1#--nodelist=}}; shift; done
case $1 in
    hostname) echo {LOOPBACK} ;;
    ray) shift 2; unset RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER
        exec "{sys.executable}" "$STANDINS/start.py" start --node-ip-address {LOOPBACK} \\
        --temp-dir "$STANDINS/$node" --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 \\
        --object-store-memory {OBJECT_STORE_BYTES} "${{@/--node-ip-address=*/--disable-usage-stats}}" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" ]] && printf 'node0\\nnode1\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a Slurm job has in its environment, and the command that sbatch would run on its first node."""
    standins = Path(tempfile.mkdtemp(prefix="graft-slurm-", dir="/tmp"))  # Ray's sockets: a short path
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (standins / name).write_text(text)
        (standins / name).chmod(0o755)
    (standins / "start.py").write_text(RAY_START)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{standins}:{PYTHON_BIN}:{os.environ['PATH']}",
        "STANDINS": str(standins),
        "GRAFT_SHARED": str(tmp_path),
        "GRAFT_RAY_PORT": str(free_port()),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the driver listens on loopback, too
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_CPUS_ON_NODE": "2",
    }
    yield environment
    for process in left_by(environment):
        process.kill()
    shutil.rmtree(standins, ignore_errors=True)


def left_by(slurm: dict[str, str]) -> list[psutil.Process]:
    """The processes of its nodes that are still there."""

    def command(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    return [process for process in psutil.process_iter() if slurm["STANDINS"] in command(process)]


@pytest.mark.slow
def test_the_slurm_script_runs_a_job_on_all_its_nodes_and_leaves_nothing(
    slurm: dict[str, str], tiny_copy: Finished, tmp_path: Path
) -> None:
    job = [str(TINY), "--set", f"store={tiny_copy.store}", "--set", "evaluate.sampler.guidance=1.25"]
    script = subprocess.Popen(
        [str(SLURM), *job],
        cwd=tmp_path,
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = script.communicate(timeout=240)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 0, said
    assert "evaluate/stage2: done" in said and "finished" in said
    assert not list(tmp_path.glob(".graftwork-slurm-*"))  # the token is gone
    assert left_by(slurm) == []


# The same without Ray: what the script itself does about signals.
QUICK = {
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
[[ $1 == hostname ]] && { echo 127.0.0.1; exit; }
trap '[[ -e saved ]] || touch early; exit' TERM
while true; do sleep 0.1; done
""",
    "scontrol": SCONTROL,
    "python": f"""#!/usr/bin/env bash
[[ $1 != -c ]] || exec "{sys.executable}" "$@"
""",
    "graft": """#!/usr/bin/env bash
echo "$RAY_ADDRESS" "$@"
trap 'sleep 1; touch saved; exit 143' TERM
[[ $2 == stay ]] || exit 0
touch begun
while true; do sleep 0.1; done
""",
}


@pytest.mark.parametrize(("job", "code"), [("go", 0), ("stay", 143)])
def test_a_slurm_job_that_gets_a_signal_saves_before_its_nodes_go(job: str, code: int, tmp_path: Path) -> None:
    (tmp_path / job).touch()
    for name, text in QUICK.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "GRAFT_SHARED": str(tmp_path), "SLURM_JOB_ID": "7"},
        **{"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_CPUS_ON_NODE": "2"},
    }
    script = subprocess.Popen(
        [str(SLURM), job, "--set", "seed=1"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    if job == "stay":
        while not (tmp_path / "begun").exists() and script.poll() is None:
            time.sleep(0.1)
        script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == code
    assert said.splitlines()[0] == f"127.0.0.1:6379 run {job} --set seed=1"
    if job == "stay":
        assert (tmp_path / "saved").exists() and not (tmp_path / "early").exists()
    assert not list(tmp_path.glob(".graftwork-slurm-*"))
