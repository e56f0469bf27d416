"""Servers that tests start on loopback beside a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.loopback import LOOPBACK, free_port

START_SECONDS = 240.0


class MlflowServer:
    """A real `mlflow server`, which can be killed and started again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://{LOOPBACK}:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(self.port)),
                *("--workers", "1", f"--backend-store-uri=sqlite:///{self.folder}/server.db"),
                f"--artifacts-destination={self.folder / 'files'}",
            ],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the MLflow server did not come up")
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.address}/health", timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of one that nobody is going to kill."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server.address
    finally:
        server.kill()
