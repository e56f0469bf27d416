"""What the tests of whole jobs share: the command line in a process of its own, and one finished tiny job."""

from __future__ import annotations

import json
import multiprocessing.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import psutil
import pytest
from filelock import FileLock

# Processes of tests run side by side, as steps do; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Inductor's cache does not tell code for one kind of processor from code for another.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = f"graftwork-inductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / cache))
# The sockets of multiprocessing lie there: not in a folder of one test's, whose path is too long for them.
multiprocessing.util.get_temp_dir()

from graftwork.cluster.machine import num_cpus  # noqa: E402
from graftwork.pipeline.store.artifacts import Store  # noqa: E402

if TYPE_CHECKING:
    from graftwork.models.rootstocks.dit import DiT
    from graftwork.stages.training.batches import TrainingSet
    from tests.small import Batch

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "digits-tiny.yaml"
GRAFT = str(Path(sys.executable).with_name("graft"))

SECONDS_TO_BEGIN = 180
SECONDS_TO_STOP = 45  # the promise is 30 to save; Ray wants a moment to go

Graft = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many processes of tests as this one may keep CPUs busy, in a container as well."""
    return num_cpus()


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark as slow what needs a cluster of several nodes; begin with the files that have slow tests.

    Files run side by side: a file of minutes that begins last leaves the other processes without work.
    """
    for item in items:
        if item.path.name == "test_cluster.py" and "site" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@dataclass(frozen=True)
class Finished:
    """A finished run of the tiny job."""

    store: Path
    outcome: dict[str, Any]

    @property
    def run(self) -> str:
        return str(self.outcome["run"])


def graft_command(*arguments: str, cwd: Path, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GRAFT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


class Driver:
    """`graft` in a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.log = cwd / f"driver-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [GRAFT, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_BEGIN
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"no {what}; the driver ended with {self.process.poll()}: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """All of Ray's processes that it started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep its tasks where they are; the driver itself and Ray's own processes go on."""
        tasks = [process for process in self.family() if process.cmdline()[:1] and "ray::" in process.cmdline()[0]]
        assert tasks
        for process in tasks:
            process.suspend()
        yield
        for process in tasks:
            process.resume()

    def signal(self, number: int) -> None:
        if number == signal.SIGINT:  # a terminal sends it to all of the group
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        return self.process.wait(SECONDS_TO_STOP), self.log.read_text()


@pytest.fixture
def graft(tmp_path: Path) -> Graft:
    """Run `graft ARGUMENTS` in an empty folder, as a user would."""

    def call(*arguments: str, cwd: Path = tmp_path, timeout: float = 550) -> subprocess.CompletedProcess[str]:
        return graft_command(*arguments, cwd=cwd, timeout=timeout)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny job, run once for all processes of the test run. Tests read its store and leave it as it is."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # above the folder of this process
    folder, outcome = shared / "tiny", shared / "tiny.json"
    with FileLock(shared / "tiny.lock"):
        if not outcome.exists():
            folder.mkdir()
            done = graft_command("run", str(TINY), "--json", cwd=folder)
            assert done.returncode == 0, done.stderr
            outcome.write_text(done.stdout)
    return Finished(store=folder / ".graftwork", outcome=json.loads(outcome.read_text()))


@pytest.fixture
def tiny_copy(tiny: Finished, tmp_path: Path) -> Finished:
    """A copy of the finished job's store, to be changed at will; MLflow's database stays behind."""
    store = tmp_path / ".graftwork"
    shutil.copytree(tiny.store, store, ignore=shutil.ignore_patterns("mlflow*"))
    return Finished(store=store, outcome=tiny.outcome)


@pytest.fixture
def distilled(tiny: Finished, tmp_path: Path) -> Path:
    """A store in which all but finetuning and what follows is done."""
    store, found = tmp_path / ".graftwork", keys(tiny.outcome)
    for step, key in found.items():
        if not step.startswith(("finetune", "evaluate")):
            shutil.copytree(tiny.store / "artifacts" / key, store / "artifacts" / key)
    return store


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test's random inputs are the same whatever ran before it, in whichever process."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def model() -> DiT:
    """A DiT in which nothing is zero: tests.small.TINY."""
    from graftwork.models.rootstocks.dit import DiT
    from tests.small import TINY, lively

    return lively(DiT(TINY))


@pytest.fixture
def batch() -> Batch:
    """Four examples for `model`."""
    import torch

    return torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 4, 5])


@pytest.fixture
def data() -> TrainingSet:
    """30 random latents of 3 classes: tests.tiny_training.make_data."""
    from tests.tiny_training import make_data

    return make_data()


@pytest.fixture
def painted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are painted and left empty: to draw one takes longer than a tiny step does. tests/test_pictures.py
    has them drawn."""

    def paint_alone(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
        from matplotlib.figure import Figure

        paint(Figure(figsize=size))
        path.touch()

    monkeypatch.setattr("graftwork.stages.pictures.drawing._draw", paint_alone)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits depend on how sums are split over threads; steps have one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def warm_ray() -> Iterator[None]:
    """Ray on this machine, whose workers fork from a process that has imported what encoding images needs: that is
    most of what each of them would take."""
    from graftwork.cluster.session import runtime

    vae = "diffusers.models.autoencoders.autoencoder_kl"  # which diffusers itself imports where it is used
    with runtime.session([], min_parallel=2, warm=("torch", "graftwork.stages.features.codec", vae)):
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server on loopback, a process of its own."""
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]  # it says which port that came to
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    deadline = time.monotonic() + 60
    while (running := re.search(r"Running on (http://[\d.]+:\d+)", log.read_text())) is None:
        assert server.poll() is None and time.monotonic() < deadline, f"moto's server did not start: {log.read_text()}"
        time.sleep(0.05)
    yield running[1]
    server.kill()
    server.wait()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store in a bucket of its own; what it downloads stays within the test."""
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    cached: Any = fsspec.get_filesystem_class("s3")  # it does not tell endpoints of the environment apart
    if any(fs._s3 is not None and fs._s3.meta.endpoint_url != s3_server for fs in cached._cache.values()):
        cached.clear_instance_cache()  # not for every test: to connect takes longer than most of them
    bucket = uuid.uuid4().hex
    store = Store(f"s3://{bucket}/some/prefix")
    store.fs.mkdir(bucket)
    return store


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception weights in the published names and shapes: random numbers that keep activations alive."""
    import pytorch_fid.inception
    import torch
    import torchvision

    state: dict[str, Any] = {}

    def keep(network: Any, _: object) -> None:
        state.update(network.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torchvision.models.Inception3, "load_state_dict", keep)
        pytorch_fid.inception.fid_inception_v3()
    draws = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.dim() == 4:  # He's deviation, for the ReLU that follows each convolution
            value.copy_(torch.randn(value.shape, generator=draws) * (2 / value[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


def keys(outcome: dict[str, Any]) -> dict[str, str]:
    """Step -> key, of a run's or a plan's JSON."""
    return {step["name"]: step["key"] for step in outcome["steps"]}


def states(outcome: dict[str, Any]) -> dict[str, str]:
    """Step -> state, of a run's or a plan's JSON."""
    return {step["name"]: step["state"] for step in outcome["steps"]}
