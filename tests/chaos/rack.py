"""All that a job runs on, each part a process that can be killed: a cluster, MLflow, the store's door, a driver."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from graftwork.cluster.training.group import TITLE
from tests.conftest import GRAFT, ROOT, TINY
from tests.loopback import LoopbackCluster, free_port
from tests.servers import MlflowServer

AWAY_SECONDS = 3.0  # that a killed server or node stays away
BUCKET = "chaos"
NO_TASKS = ("IDLE", TITLE, "Board", "DashboardAgent", "RuntimeEnvAgent")


class Rack:
    """The tiny job's world. Each `kill_*` returns what it hit, or None where there was nothing to hit."""

    def __init__(self, folder: Path, s3_server: str, draws: random.Random) -> None:
        self.folder, self.draws = folder, draws
        self.s3 = int(s3_server.rpartition(":")[2])
        self.round = 0
        self.driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.door_port = free_port()
            self.open_door()
            stack.callback(self.close_door)
            self.mlflow = MlflowServer(self.folder / "mlflow")
            self.mlflow.start()
            stack.callback(self.mlflow.kill)
            self.given = {
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door_port}",
                "TMPDIR": str(self.folder),
                "PYTHONPATH": str(ROOT),
            }
            self.cluster = stack.enter_context(LoopbackCluster(workers=2, worker_cpus=2, environment=self.given))
            stack.callback(self.end_driver)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()

    @property
    def store(self) -> str:
        return f"s3://{BUCKET}/round{self.round}"

    @property
    def log(self) -> Path:
        return self.folder / f"driver{self.round}.log"

    def start_driver(self) -> None:
        """Begin with the round's job, or go on with it."""
        where = ["--set", f"store={self.store}", "--set", f"tracking.uri={self.mlflow.address}"]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [GRAFT, "run", str(TINY), *where, "--set", f"tracking.experiment=round{self.round}"],
                cwd=self.folder,
                env=self.cluster.driver_environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The driver's exit code, once it has one."""
        return None if self.driver is None else self.driver.poll()

    def end_driver(self) -> None:
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()

    def open_door(self) -> None:
        self.door = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forward.py")), str(self.door_port), str(self.s3)]
        )
        for _ in range(200):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.door_port), timeout=1).close()
                return
            time.sleep(0.05)
        raise TimeoutError("the store's door did not open")

    def close_door(self) -> None:
        os.kill(self.door.pid, signal.SIGKILL)
        self.door.wait()

    # -- faults

    def faults(self) -> dict[str, Callable[[], str | None]]:
        return {
            "driver": self.kill_driver,
            "task": lambda: self._kill_worker(lambda title: title not in NO_TASKS),
            "train worker": lambda: self._kill_worker(lambda title: title == TITLE),
            "node": self.kill_node,
            "MLflow": self.kill_mlflow,
            "store": self.kill_store,
        }

    def kill_driver(self) -> str | None:
        if self.driver is None or self.driver.poll() is not None:
            return None
        self.end_driver()
        return f"process {self.driver.pid}"

    def _kill_worker(self, wanted: Callable[[str], bool]) -> str | None:
        found = [(process, title) for process, title in self.cluster.running().items() if wanted(title)]
        if not found:
            return None
        process, title = self.draws.choice(found)
        with suppress(psutil.Error):
            process.kill()
        return title

    def kill_node(self) -> str | None:
        name = self.draws.choice([name for name in self.cluster.nodes if name != "head"])
        self.cluster.kill(name)
        time.sleep(AWAY_SECONDS)
        self.cluster.start_worker(name)
        return name

    def kill_mlflow(self) -> str | None:
        self.mlflow.kill()
        time.sleep(AWAY_SECONDS)
        self.mlflow.start()
        return self.mlflow.address

    def kill_store(self) -> str | None:
        self.close_door()
        time.sleep(AWAY_SECONDS)
        self.open_door()
        return "its door"
