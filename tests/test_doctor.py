"""What a doctor sees: real folders, ports and servers, and machines as they are elsewhere, put before single checks."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import graftwork
from graftwork.cluster import drivers
from graftwork.cluster.checks import devices, health, inspection
from graftwork.cluster.checks.probes import Check, Probe, broken, fine, look, refused, run_phases, run_probes, warning
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.doctor import checkup, doctor
from graftwork.pipeline.execution import remote
from graftwork.pipeline.store import remote as remote_files
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.operators import HyenaY, Place, Swa
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import load
from tests.conftest import ROOT, TINY, Graft
from tests.loopback import LoopbackCluster, free_port
from tests.servers import WebServer
from tests.test_full_disk import ON_A_SMALL_DISK

SECRET = "hunter2-hunter2-hunter2"
CHECK_FIELDS = {"name": str, "state": str, "seen": str, "advice": str, "values": dict, "node": str, "seconds": float}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment of whoever tests."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith(("MLFLOW_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def state_of(check: Check) -> str:
    """The state of a check that says what to do, unless there is nothing to be done."""
    assert "\n" not in check.seen and (check.state == "fine") == (not check.advice), check
    return check.state


def probe(function: str, argument: Any = None, seconds: float = 20.0) -> Probe:
    return Probe(function, f"tests.probed:{function}", argument, seconds, "mend it")


# -- checks that do not come back


def test_a_check_that_crashes_hangs_or_fails_is_one_line_and_the_others_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROBED_TOKEN", SECRET)
    last = probe("well", {"what": "whole"})
    chain = [probe("crash"), probe("leave"), probe("chatter"), probe("betray"), probe("hang", seconds=1.0), last]
    checks = list(run_probes(chain))
    assert [state_of(check) for check in checks] == ["broken", "broken", "fine", "broken", "broken", "fine"]
    assert "SIGSEGV: cannot find symbol" in checks[0].seen
    assert "RuntimeError: no way to" in checks[3].seen and SECRET not in str(checks)
    assert checks[4].seen == "no answer within 1 s" and checks[4].advice == "mend it"
    assert checks[5].seen == "whole"


def test_when_the_time_for_all_is_over_the_rest_is_said_to_be_left_out() -> None:
    checks = list(run_probes([probe("hang"), probe("well", {"what": "late"})], 1.0))
    assert [state_of(check) for check in checks] == ["warning", "warning"]
    assert all("not looked at" in check.seen for check in checks)


def test_a_chain_that_hangs_holds_up_no_other() -> None:
    beside = [[probe("hang", seconds=1.0)], [probe("well", {"what": "beside"})]]
    seen = [check.seen for check in run_phases([beside, [[probe("well", {"what": "after"})]]], 60.0)]
    assert {*seen[:2]} == {"beside", "no answer within 1 s"} and seen[2:] == ["after"]


def test_children_end_with_whoever_started_them() -> None:
    hang = "from graftwork.cluster.checks.probes import Probe, run_probes\n"
    hang += "list(run_probes([Probe('hang', 'tests.probed:hang', None, 600.0)]))"
    parent = subprocess.Popen([sys.executable, "-c", hang], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive


def test_children_need_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/not/there")
    (check,) = run_probes([probe("well", {"what": "anyway"})])
    assert check.seen == "anyway"


def test_an_endless_text_with_line_ends_is_a_short_line() -> None:
    check = broken("library", "first\n\nlast\x1b[31m" + "x" * 5000, "read on")
    assert check.seen.startswith("first last\\x1b") and len(check.seen) <= 600


# -- a machine


def test_the_requirements_are_those_of_the_project() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = (re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?(?:,<[\d.]+)?", line) for line in listed)
    assert {match[1]: match[2] or "" for match in found if match} == health.REQUIREMENTS


@pytest.mark.parametrize(
    ("package", "version", "told"),
    [
        ("ray", "2.59.1", "too old: ray 2.59.1 (at least 2.60)"),
        ("peft", None, "not installed: peft"),
        ("torch", "2.6.0+cu124", None),
        ("deepspeed", "0.20", None),
    ],
)
def test_packages_are_held_against_them(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, told: str | None
) -> None:
    real = health._version
    monkeypatch.setattr(health, "_version", lambda name: version if name == package else real(name))
    check = health.check_packages()
    assert state_of(check) == ("broken" if told else "fine") and (told is None or told in check.seen)


def test_the_source_has_another_hash_when_a_file_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    monkeypatch.setattr(graftwork, "__file__", str(tmp_path / "__init__.py"))
    before = health.check_code().values["source"]
    (tmp_path / "real" / "stage.py").write_text("version = 2\n")
    assert health.check_code().values["source"] != before


def test_a_place_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    assert state_of(health.check_disk("disk", tmp_path / "yet" / "to come", "elsewhere")) != "broken"
    check = health.check_disk("disk", Path("/proc/nowhere"), "elsewhere")
    assert state_of(check) == "broken" and "cannot be written" in check.seen


@pytest.mark.parametrize(
    ("free", "state"), [(2**26, "broken"), (2**31, "warning"), (2**40, "fine"), (3 * 2**34, "warning")]
)
def test_a_disk_that_is_nearly_full_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str
) -> None:
    usage = SimpleNamespace(free=free, total=2**41, used=2**41 - free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert state_of(health.check_disk("disk", tmp_path, "elsewhere")) == state


FULL = """
import json, sys
from pathlib import Path
from graftwork.cluster.checks import health
from graftwork.pipeline.doctor import checkup

place = Path(sys.argv[1])
(place / "filler").write_bytes(bytes(2**20))
checks = [health.check_disk("disk", place, "elsewhere"), *checkup.check_store({"url": str(place / "store")})]
left = [str(path) for path in (place / "store").glob("runs/*")]
print(json.dumps({"checks": [[check.state, check.seen] for check in checks], "left": left}))
"""


def test_a_disk_without_room_for_more_files_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(f_frsize=4096, f_blocks=10**9, f_bfree=10**8, f_bavail=10**8, f_files=10**6, f_favail=3)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    check = health.check_disk("disk", tmp_path, "elsewhere")
    assert state_of(check) == "broken" and "3 more files" in check.seen


def test_a_full_disk_is_broken(tmp_path: Path) -> None:
    command = [*ON_A_SMALL_DISK, "1100k", str(tmp_path), sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (disk, seen), (store, full), *_ = found["checks"]
    assert (disk, store, found["left"]) == ("broken", "broken", [])
    assert "No space left" in seen and "full" in full


def test_a_folder_for_temporary_files_that_is_none_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/not/there")
    (check,) = health.check_scratch()
    assert state_of(check) == "broken" and "'/not/there', no such folder" in check.seen and "accepted" in check.advice


@pytest.mark.parametrize(("gpus", "state"), [(0, "warning"), (1, "warning"), (8, "broken")])
def test_the_64_mb_of_a_container_are_too_little(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, state: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**26, total=2**26, used=0))
    monkeypatch.setattr(health, "num_gpus_here", lambda: gpus)
    check = health.check_shared_memory(tmp_path)
    assert state_of(check) == state and "--shm-size" in check.advice


@pytest.mark.parametrize(
    ("soft", "hard", "state"), [(1024, 2**20, "fine"), (512, 2**20, "warning"), (128, 128, "broken")]
)
def test_few_open_files_are_told(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    assert state_of(next(iter(health.check_limits()))) == state


@pytest.mark.parametrize("home", ["/proc", "/not/there", "not absolute"])
def test_a_home_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "access", lambda place, _: str(place) != "/proc")
    assert state_of(health.check_home()) == "warning"


@pytest.mark.parametrize(
    ("usable", "machine", "load", "state"),
    [(1, 64, 0, "warning"), (8, 64, 900, "warning"), (8, 64, 3, "fine"), (1, 1, 0, "fine")],
)
def test_one_cpu_of_many_is_told(
    monkeypatch: pytest.MonkeyPatch, usable: int, machine: int, load: float, state: str
) -> None:
    monkeypatch.setattr(health, "num_cpus", lambda: usable)
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    assert state_of(health.check_cpus()) == state


def test_a_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    assert state_of(next(health.check_compilers())) == "warning"
    monkeypatch.setattr(health, "num_gpus_here", lambda: 1)
    assert state_of(next(health.check_compilers())) == "broken"  # Triton wants one
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = [check.seen for check in health.check_compilers()]
    assert seen == ["none", "none"]


def environment(**variables: str) -> dict[str, Check]:
    return {check.name: check for check in health.check_environment(variables)}


def test_a_proxy_that_takes_requests_to_this_machine_is_told_without_its_password() -> None:
    check = environment(http_proxy=f"http://me:{SECRET}@proxy:3128")["proxy"]
    assert state_of(check) == "warning" and "no_proxy=" in check.advice and SECRET not in str(check)
    past = environment(HTTPS_PROXY="http://proxy:3128", no_proxy="localhost,127.0.0.1,.local")["proxy"]
    assert state_of(past) == "fine"
    other = environment(ALL_PROXY="socks5://proxy:1080", NO_PROXY=".internal")["proxy"]
    assert state_of(other) == "warning"
    assert "proxy" not in environment()


@pytest.mark.parametrize(("threads", "told"), [("1", False), ("4,2", False), ("0", True), ("many", True), ("", True)])
def test_a_number_of_threads_that_is_none_is_told(threads: str, told: bool) -> None:
    assert ("threads" in environment(OMP_NUM_THREADS=threads)) == told


def test_gpus_that_a_variable_hides_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "num_gpus_here", lambda: 2)
    assert state_of(environment(CUDA_VISIBLE_DEVICES="")["visible GPUs"]) == "warning"
    assert "visible GPUs" not in environment(CUDA_VISIBLE_DEVICES="0")


def test_variables_that_matter_are_named_without_their_values() -> None:
    named = environment(TMPDIR="/somewhere", NCCL_DEBUG="INFO", EDITOR="ed")["environment"].seen
    assert named == "set: NCCL_DEBUG, TMPDIR"
    assert SECRET not in str(environment(HF_TOKEN=SECRET, MLFLOW_TRACKING_PASSWORD=SECRET))


# -- GPUs


def gpus(monkeypatch: pytest.MonkeyPatch, machine: int, here: int) -> list[Check]:
    monkeypatch.setattr(devices, "num_gpus_of_machine", lambda: machine)
    monkeypatch.setattr(devices, "num_gpus_here", lambda: here)
    return list(devices.check_gpus())


def test_no_gpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (check,) = gpus(monkeypatch, 0, 0)
    assert state_of(check) == "fine" and check.seen.startswith("none")


def test_a_container_that_was_given_none_of_the_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (check,) = gpus(monkeypatch, 8, 0)
    assert state_of(check) == "warning" and "--gpus all" in check.advice


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can be used")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    monkeypatch.setattr(drivers, "PROC", tmp_path)
    monkeypatch.setattr(devices, "driver_cuda", lambda: (12, 4))
    (check,) = gpus(monkeypatch, 1, 1)
    assert state_of(check) == "broken" and "NVIDIA 550.54.15, for CUDA up to 12.4" in check.seen
    assert torch.__version__ in check.seen and "driver" in check.advice


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Two GPUs on which nothing is computed; bytes that are free on them."""
    free = {"bytes": 79 * 10**9}
    settings: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda _: None,
        "synchronize": lambda _: None,
        "get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
        "mem_get_info": lambda _: (free["bytes"], 8 * 10**10),
        "get_device_properties": lambda _: SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0),
    }
    for name, value in settings.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(devices, "gpu_problem", lambda: None)
    with FakeTensorMode():
        yield free


def test_each_gpu_is_looked_at_and_one_that_others_use_is_told(
    monkeypatch: pytest.MonkeyPatch, two_gpus: dict[str, int]
) -> None:
    driver, *cards = gpus(monkeypatch, 2, 2)
    assert [state_of(check) for check in (driver, *cards)] == ["fine"] * 3
    assert [check.name for check in cards] == ["GPU 0", "GPU 1"] and cards[0].values["total_bytes"] == 8e10
    two_gpus["bytes"] = 10**10
    assert [state_of(check) for check in gpus(monkeypatch, 2, 2)] == ["fine", "warning", "warning"]


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_is_timed_in_each_precision() -> None:
    checks = list(devices.check_matmul())
    assert [check.name for check in checks] == ["matmul on GPU 0", "matmul on GPU 1"]
    assert {*checks[0].values} == {"model", *(f"{kind}_flop_per_s" for kind in ("fp32", "tf32", "bf16"))}
    assert "data sheet" in doctor.judged(checks[0]).seen


@pytest.mark.parametrize(("speed", "state"), [(6e14, "fine"), (1e14, "warning")])
def test_a_gpu_is_held_against_its_data_sheet(speed: float, state: str) -> None:
    measured = fine("matmul on GPU 0", "bf16", bf16_flop_per_s=speed, model="NVIDIA H100 80GB HBM3")
    assert state_of(doctor.judged(measured)) == state
    for model in ("NVIDIA Something", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        other = fine("matmul on GPU 0", "bf16", bf16_flop_per_s=1.0, model=model)
        assert doctor.judged(other) == other


def test_a_kernel_is_held_against_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    place, cpu = Place(width=32, heads=2, num_tokens=16), torch.device("cpu")
    assert state_of(devices._kernel(HyenaY(), place, cpu)) == "warning"  # there is none for a CPU

    def computing(change: float) -> None:
        def run(spec: Swa, *_: object) -> list[torch.Tensor]:
            if spec.backend == "kernel" and change < 0:
                raise RuntimeError("undefined symbol: _ZN3c10")
            return [torch.ones(3), torch.ones(3) + (change if spec.backend == "kernel" else 0)]

        monkeypatch.setattr(devices, "_run", run)

    for change, state in ((0.0, "fine"), (0.5, "broken"), (float("nan"), "broken"), (-1.0, "broken")):
        computing(change)
        assert state_of(devices._kernel(Swa(), place, cpu)) == state, change


def test_each_operator_that_has_a_kernel_is_looked_at() -> None:
    kinds = {"mha", "swa", "hyena_se", "hyena_x", "hyena_y", "mamba2", "mlp_hyena_x"}
    assert kinds <= {*devices.accelerated_kinds()}
    assert all(look(probe) == [] for probe in devices.PROBES if "kernel" in probe.name) or torch.cuda.is_available()


def test_operators_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert [state_of(check) for check in devices.check_operators()] == ["fine", "fine"]
    monkeypatch.setattr(devices, "_run", lambda *_: [torch.tensor([float("inf")])])
    assert state_of(next(iter(devices.check_operators()))) == "broken"


# -- places


def store_check(url: str, **argument: str) -> Check:
    return next(iter(checkup.check_store({"url": url, **argument})))


@pytest.fixture
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy this machine is tells nothing of a store."""
    monkeypatch.setattr(checkup, "SLOW_STORE", 0)


@pytest.mark.usefixtures("any_speed")
def test_a_store_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    assert state_of(store_check(str(tmp_path / "new" / "store"))) == "fine"
    assert not (tmp_path / "new" / "store").exists()
    Store(str(tmp_path / "old")).write_run("run", "{}")
    before = sorted(tmp_path.rglob("*"))
    assert state_of(store_check(str(tmp_path / "old"))) == "fine"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_cannot_be_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (str(tmp_path / "file" / "store"), "/proc/store", "gopher://store", "s3://"):
        assert state_of(store_check(url)) == "broken", url


def test_a_store_that_nodes_do_not_share_is_broken(tmp_path: Path) -> None:
    Store(str(tmp_path / "store")).files.write("runs/marker", b"shared")
    assert state_of(store_check(str(tmp_path / "store"), marker="runs/marker")) == "fine"
    check = store_check(str(tmp_path / "other"), marker="runs/marker")
    assert state_of(check) == "broken" and "another folder here" in check.seen


@pytest.mark.usefixtures("any_speed")
def test_buckets_are_looked_at_too(s3: Store) -> None:
    check = store_check(s3.url)
    assert state_of(check) == "fine" and float(check.values["write_bytes_per_s"]) > 0
    assert s3.names("runs") == []
    lost = store_check("s3://no-such-bucket/prefix")
    assert state_of(lost) == "broken" and "bucket" in lost.seen + lost.advice


@pytest.mark.timeout(60)
def test_a_store_that_does_not_answer_is_broken_soon(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(remote_files, "RETRY_SECONDS", 1e9)  # a job has patience
    monkeypatch.setattr(checkup, "RETRY_SECONDS", 0.1)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    assert state_of(store_check("s3://elsewhere/prefix")) == "broken"


@pytest.fixture
def web() -> Iterator[list[WebServer]]:
    servers: list[WebServer] = []
    yield servers
    for server in servers:
        server.close()


def mlflow(uri: str | None, store: Path) -> Check:
    return checkup.check_mlflow({"store": str(store), "tracking": None if uri is None else {"uri": uri}})


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [(403, "", "403"), (200, "<html>log in</html>", "does not answer as an MLflow server"), (500, "", "500")],
)
def test_whoever_answers_in_the_place_of_mlflow_is_told(
    web: list[WebServer], tmp_path: Path, status: int, body: str, told: str
) -> None:
    web.append(WebServer(status, body))
    check = mlflow(web[0].address, tmp_path)
    assert state_of(check) == "broken" and told in check.seen


def test_mlflow_that_is_down_is_broken_and_its_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    check = mlflow(None, tmp_path)
    assert state_of(check) == "broken" and "does not answer" in check.seen and SECRET not in str(check)


def test_without_a_job_a_database_in_the_store_will_do(tmp_path: Path) -> None:
    assert state_of(mlflow(None, tmp_path / "store")) == "fine" and not (tmp_path / "store").exists()
    assert state_of(checkup.check_mlflow({"store": "memory://store", "tracking": None})) == "warning"


def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **variables: str) -> list[Check]:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return list(checkup.check_hub())


def test_the_hub_is_asked_unless_that_is_forbidden(
    web: list[WebServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web.append(WebServer(200))
    cache, reached = hub(monkeypatch, tmp_path, HF_ENDPOINT=web[0].address)
    assert str(tmp_path / "hub") in cache.seen and state_of(reached) == "fine"
    web[0].status = 503
    assert state_of(hub(monkeypatch, tmp_path)[1]) == "warning"
    asked = len(web[0].asked)
    assert state_of(hub(monkeypatch, tmp_path, HF_HUB_OFFLINE="1")[1]) == "fine" and len(web[0].asked) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert state_of(hub(monkeypatch, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")[1]) == "warning"


# -- jobs


NODE = {"CPU": 2.0, "GPU": 0.0, "memory": 8e9}
H100 = {"model": "NVIDIA H100 80GB HBM3", "total_bytes": 8e10}


def fit(*overrides: str, nodes: list[dict[str, float]] | None = None, gpus: Sequence[Any] = ()) -> dict[str, Check]:
    """The checks of the tiny job on these nodes, or on this machine with these GPUs."""
    job = load(TINY, overrides).model_dump(mode="json")
    return {check.name: check for check in checkup.check_job({"job": job, "nodes": nodes, "gpus": gpus})}


def test_the_tiny_job_fits_any_machine(tmp_path: Path) -> None:
    checks = fit(f"store={tmp_path / 'store'}")
    assert {name: state_of(check) for name, check in checks.items()} == dict.fromkeys(
        ("job", "job's resources", "job's memory", "job's store"), "fine"
    )


def resources(*asked: str, **there: Any) -> str:
    """How the resources are that a job asks for; what is short is named."""
    check = fit(*asked, **there)["job's resources"]
    assert check.state == "fine" or asked[0].split(".")[1].split("=")[0] in check.seen
    return state_of(check)


@pytest.mark.parametrize(
    ("asked", "gpus", "state"),
    [
        (["resources.distill.gpu=1"], [], "broken"),
        (["resources.distill.gpu=0.5"], [H100], "fine"),
        (["resources.finetune.gpu=1"], [H100], "broken"),  # it has two workers
        (["resources.finetune.gpu=1", "finetune.min_workers=1"], [H100], "warning"),
        (["resources.finetune.gpu=1"], [H100, H100], "fine"),
        (["resources.base.memory=64TiB"], [], "broken"),
        (["resources.base.cpu=1000"], [], "fine"),  # a Ray of our own shares the CPUs out
        (["resources.distill={gpu: 1, custom: {'accelerator_type:H100': 0.001}}"], [H100], "fine"),
        (["resources.distill={gpu: 1, custom: {'accelerator_type:A100': 0.001}}"], [H100], "broken"),
    ],
    ids=str,
)
def test_a_job_that_asks_for_more_than_this_machine_has_is_broken(
    asked: list[str], gpus: list[Any], state: str
) -> None:
    assert resources(*asked, gpus=gpus) == state


@pytest.mark.parametrize(
    ("asked", "nodes", "state"),
    [
        (["resources.finetune.gpu=1"], [{**NODE, "GPU": 1.0}] * 2, "fine"),
        (["resources.finetune.gpu=1"], [{**NODE, "GPU": 1.0}], "broken"),
        (["resources.base.custom={fast: 1}"], [NODE], "broken"),
        (["resources.profile.cpu=16"], [NODE], "broken"),
        (["resources.profile.cpu=16"], [NODE, {**NODE, "CPU": 16.0}], "fine"),
        (["resources.finetune.cpu=0"], [NODE], "fine"),
    ],
    ids=str,
)
def test_a_job_that_asks_for_more_than_the_nodes_have_is_broken(
    asked: list[str], nodes: list[dict[str, float]], state: str
) -> None:
    assert resources(*asked, nodes=nodes) == state


def test_a_training_that_no_gpu_can_hold_is_broken(tmp_path: Path) -> None:
    large = (f"store={tmp_path}", "model={kind: dit, size: XL/2}", "resources.finetune.gpu=1")
    for size, state in ((4e9, "broken"), (8e10, "fine")):
        assert state_of(fit(*large, gpus=[{**H100, "total_bytes": size}] * 2)["job's memory"]) == state


def test_a_store_without_room_for_the_job_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20, total=2**40, used=2**40))
    assert state_of(fit(f"store={tmp_path}")["job's store"]) == "broken"


def test_files_that_are_not_here_are_broken_and_what_a_run_fetches_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def files(*overrides: str) -> list[str]:
        job = load(TINY, overrides).model_dump(mode="json")
        return [state_of(check) for check in checkup.check_files({"job": job})]

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert files() == ["fine"]
    assert files("data={kind: image_folder, path: /not/there, image_size: 16}") == ["broken"]
    from_the_hub = "weights={kind: checkpoint, path: somebody/something}"
    assert files(from_the_hub) == ["warning"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert files(from_the_hub) == ["broken"]


# -- nodes


def node(python: str = "3.11.7", source: str = "aa", **packages: str) -> list[Check]:
    versions: dict[str, float | str] = {"ray": "2.60.0", "torch": "2.15.0", **packages}
    return [
        fine("python", python, version=python),
        fine("graftwork", source, version="0.1.0", source=source),
        Check("packages", "fine", "all", values=versions),
    ]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (node(), {"same versions": "fine"}),
        (node(python="3.11.9"), {"same python": "warning"}),
        (node(python="3.12.1"), {"same python": "broken"}),
        (node(source="bb"), {"same source": "broken"}),
        (node(torch="2.14.0"), {"same torch": "broken"}),
        (node(ray="2.61.0", mlflow="3.1"), {"same ray": "broken", "same mlflow": "warning"}),
    ],
    ids=["the same", "patch of Python", "Python", "source", "torch", "two"],
)
def test_versions_that_differ_between_nodes_are_told(other: list[Check], expected: dict[str, str]) -> None:
    checks = inspection.differences({"first": node(), "second": other})
    assert {check.name: state_of(check) for check in checks} == expected
    assert all("first" in check.seen and "second" in check.seen for check in checks if check.state != "fine")


def test_a_clock_that_is_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def clocks(off: float) -> str:
        now = time.time()
        monkeypatch.setattr(ray, "get", lambda *_, **__: now + off)
        actor = SimpleNamespace(clock=SimpleNamespace(remote=lambda: None))
        there = inspection.Node("id", "name", "10.0.0.1", {})
        (check,) = inspection._clocks({there: actor})
        return state_of(check)

    assert [clocks(off) for off in (0.0, 30.0, -30.0, 900.0)] == ["fine", "warning", "warning", "broken"]


def test_a_name_that_stands_for_loopback_is_told() -> None:
    names = {"here": [fine("host name", "here is 127.0.1.1", address="127.0.1.1")]}
    (check,) = inspection.unreachable_names(names)
    assert state_of(check) == "warning" and check.node == "here"


def test_what_one_node_sends_the_next_gets() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=inspection._take, args=(server,), daemon=True).start()
    assert inspection.Inspector().send(server.getsockname()) > 0
    with pytest.raises(OSError, match="refused"):
        inspection.Inspector().send(("127.0.0.1", free_port()))


def test_a_name_that_stands_for_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_of(health.check_loopback()) == "fine"
    for name in ("no-such-host.invalid", "192.0.2.1"):  # the latter is nobody's
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert state_of(health.check_host_name()) == "warning", name


# -- the command


def command(monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str) -> Any:
    monkeypatch.setattr(doctor, "_machine", lambda *_: iter(checks))
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([fine("one", "well")], 0),
        ([fine("one", "well"), warning("two", "slow", "wait")], 0),
        ([broken("three", "gone", "mend it"), fine("one", "well")], 1),
    ],
    ids=["fine", "warning", "broken"],
)
def test_the_exit_code_says_whether_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, checks: list[Check], code: int
) -> None:
    done = command(monkeypatch, checks)
    assert done.exit_code == code, done.output
    for check in checks:
        assert re.search(rf"^{check.state} +{check.name} +{check.seen}.*{check.advice}$", done.stdout, re.MULTILINE)
    found = json.loads(command(monkeypatch, checks, "--json").stdout)
    assert (
        found["state"]
        == ("fine", "warning", "broken")[max(["fine", "warning", "broken"].index(c.state) for c in checks)]
    )


@pytest.mark.parametrize(
    "arguments",
    [["no-such.yaml"], [str(TINY), "--set", "finetune.steps=none"], ["--address", "head:8265"], ["--fast"]],
    ids=str,
)
def test_what_is_no_request_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    done = command(monkeypatch, [], *arguments)
    assert done.exit_code == 2, done.output


def test_a_cluster_that_does_not_answer_is_a_broken_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = graftwork.doctor(address=f"http://127.0.0.1:{free_port()}", store="s3://bucket/prefix")
    (check,) = made.checks
    assert made.state == "broken" and "does not answer" in check.seen and state_of(check) == "broken"
    monkeypatch.setattr(doctor, "run_phases", lambda *_: iter([fine("python", "still here")]))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert [state_of(check) for check in graftwork.doctor().checks] == ["broken", "fine"]
    with pytest.raises(SpecError, match="accepted: a Ray dashboard"):
        graftwork.doctor(address="head:8265")


def test_an_answer_of_the_head_that_is_no_document_is_a_broken_line() -> None:
    (check,) = doctor._answered("", "graft: SomeError: no module\n")
    assert check.state == "broken" and "SomeError" in check.seen


def test_the_line_of_a_refusal_becomes_what_was_seen_and_what_to_do() -> None:
    check = refused("field", "data.path: got 'x'; accepted: a folder")
    assert (check.seen, check.advice) == ("data.path: got 'x'", "accepted: a folder")


def test_an_error_of_a_check_itself_is_what_is_broken() -> None:
    (check,) = look(Probe("mine", "graftwork.cluster.checks.health:check_nothing"))
    assert state_of(Check(**{**vars(check), "advice": "x"})) == "broken" and "AttributeError" in check.seen


def test_importing_the_command_loads_neither_ray_nor_torch() -> None:
    line = (
        "import sys, graftwork.pipeline.doctor.doctor; print({'ray', 'torch', 'mlflow', 'deepspeed'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_this_machine_is_looked_at_whole(graft: Graft, tmp_path: Path) -> None:
    done = graft("doctor", str(TINY), "--set", "resources.distill.gpu=64", "--json")
    found = json.loads(done.stdout)
    assert {*found} == {"format", "state", "seconds", "checks"} and found["format"] == 1
    for check in found["checks"]:
        assert {name: type(value) for name, value in check.items()} == CHECK_FIELDS
        assert check["state"] in ("fine", "warning", "broken") and (check["state"] == "fine") == (not check["advice"])
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["job's resources"] == "broken" and done.returncode == 1
    broken_checks = [check for check in found["checks"] if check["state"] == "broken"]
    assert {check["name"] for check in broken_checks if "no answer within" not in check["seen"]} == {"job's resources"}
    wanted = {
        "python",
        "packages",
        "cpus",
        "memory",
        "store",
        "MLflow",
        "hub cache",
        "Ray",
        "torch",
        "operators",
        "job",
    }
    assert wanted <= {*states} and any(name.startswith("matmul") for name in states)
    assert not (tmp_path / ".graftwork").exists()


@pytest.mark.slow
def test_a_node_with_another_version_is_told(tmp_path: Path) -> None:
    metadata = tmp_path / "other" / "mlflow-3.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 3.0.1\n")
    with LoopbackCluster(workers=0) as cluster:
        cluster.start_worker("other", environment={"PYTHONPATH": str(metadata.parent.parent)})
        cluster.wait_for(2)
        done = subprocess.run(
            [*remote.GRAFT, "doctor", "--json", "--store", str(tmp_path / "store"), "--address", cluster.address],
            env={**cluster.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert cluster.token not in done.stdout
    found = json.loads(done.stdout)
    checks = {(check["name"], check["node"]): check for check in found["checks"]}
    assert checks["same mlflow", ""]["state"] == "warning" and "3.0.1 on" in checks["same mlflow", ""]["seen"]
    nodes = {node for _, node in checks} - {""}
    assert len(nodes) == 2 and sum(node.endswith("(head)") for node in nodes) == 1
    for name in ("python", "store", "clock", "way to nodes", "torch"):
        assert all((name, node) in checks for node in nodes), name
    broken_checks = [check for check in found["checks"] if check["state"] == "broken"]
    assert [check for check in broken_checks if "no answer within" not in check["seen"]] == []  # two nodes share it
