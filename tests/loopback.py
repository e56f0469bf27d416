"""A real Ray cluster on loopback: a head and workers, each node a session of processes of its own, with a token.

`with LoopbackCluster(workers=2) as cluster:` starts it; `cluster.kill(node)` is a machine that lost its power. Nothing
here touches any other Ray on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from graftwork.cluster.session.runtime import KEPT_IDLE_MS

LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0  # a head that is not up by then never will be
OBJECT_STORE_BYTES = 128 * 1024**2
PYTHON_BIN = Path(sys.executable).parent

# `ray start` that stays on loopback: Ray replaces 127.0.0.1 by an address that other machines reach, and then listens
# on all of them. The variable is its own switch for that, but refuses worker nodes in the process that reads it.
RAY_START = """
import os
import ray
from ray._private import services
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Node:
    """One node: `ray start --block`, the leader of a session in which all of the node's processes are."""

    name: str
    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """All that run on the node, drivers of jobs and what they started included."""
        found = {process.pid: process for process in psutil.process_iter() if _session(process) == self.process.pid}
        for process in list(found.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {child.pid: child for child in process.children(recursive=True)}
        return [process for process in found.values() if process.is_running()]

    def listening(self) -> set[str]:
        """The addresses on which the node's processes listen for TCP."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                sockets = process.net_connections("tcp")
                found |= {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        return found

    def kill(self) -> None:
        """SIGKILL everything at once, and again what was born meanwhile."""
        while alive := [one for one in self.processes() if one.status() != psutil.STATUS_ZOMBIE]:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
            psutil.wait_procs(alive, timeout=5)
        self.process.wait()


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


class LoopbackCluster:
    """A head and `workers` nodes on 127.0.0.1, authentication on, with the Jobs API at `address`.

    token: what opens the cluster; `token_file` holds it, and `environment` is that of someone who has the file.
    """

    def __init__(
        self,
        workers: int = 2,
        head_cpus: int = 0,
        worker_cpus: int = 2,
        resources: str = "{}",
        environment: dict[str, str] | None = None,
        head_options: tuple[str, ...] = (),
        port: int | None = None,
    ) -> None:
        self.workers, self.head_cpus, self.worker_cpus, self.resources = workers, head_cpus, worker_cpus, resources
        self.given, self.head_options = environment or {}, head_options
        self.gcs = port or free_port()
        self.nodes: dict[str, Node] = {}
        self.token = secrets.token_hex(32)

    def __enter__(self) -> Self:
        # Sockets lie in here, and their paths may not be longer than 107 bytes: not pytest's folder.
        self.folder = Path(tempfile.mkdtemp(prefix="graft-ray-", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)
        self.dashboard = free_port()
        self.address = f"http://{LOOPBACK}:{self.dashboard}"
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith("RAY_") and name != "PYTHONPATH"
            },
            "PATH": f"{PYTHON_BIN}:{os.environ['PATH']}",  # as in an activated environment
            "RAY_AUTH_MODE": "token",
            "RAY_idle_worker_killing_time_threshold_ms": str(KEPT_IDLE_MS),
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            **self.given,
        }
        try:
            self.start_head()
            for number in range(self.workers):
                self.start_worker(f"worker{number}")
            self.wait_for(1 + self.workers)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def driver_environment(self) -> dict[str, str]:
        """That of a process on this machine which joins the cluster by itself; it, too, must stay on loopback."""
        return {
            **self.environment,
            "RAY_ADDRESS": f"{LOOPBACK}:{self.gcs}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self.nodes):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, name: str) -> None:
        """The node is gone, with all its processes, without a word."""
        self.nodes.pop(name).kill()

    def start_head(self) -> None:
        self._start(
            "head",
            *("--head", "--port", str(self.gcs), "--num-cpus", str(self.head_cpus)),
            *("--include-dashboard", "true", "--dashboard-host", LOOPBACK, "--dashboard-port", str(self.dashboard)),
            *("--ray-client-server-port", str(free_port()), *self.head_options),
        )
        self._wait("the head", self._up)

    def start_worker(self, name: str, cpus: int | None = None, environment: dict[str, str] | None = None) -> None:
        """environment: of this node alone, beside that of all."""
        self._start(
            name,
            *("--address", f"{LOOPBACK}:{self.gcs}", "--resources", self.resources),
            *("--num-cpus", str(self.worker_cpus if cpus is None else cpus)),
            environment=environment,
        )

    def wait_for(self, nodes: int) -> None:
        """Until so many nodes are alive."""
        self._wait(f"{nodes} nodes", lambda: self.alive() >= nodes)

    def alive(self) -> int:
        """The nodes that the head believes alive."""
        with self._get("/api/v0/nodes?limit=1000") as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def running(self) -> dict[psutil.Process, str]:
        """Ray's workers, each with what it runs by Ray's title of it: `IDLE`, an actor's class, a task's name."""
        found = {}
        for node in self.nodes.values():
            for process in node.processes():
                with contextlib.suppress(psutil.Error, IndexError):
                    kind, _, title = process.cmdline()[0].partition("::")
                    if kind == "ray":
                        found[process] = title.partition(".")[0].partition("(")[0]
        return found

    def logs(self) -> str:
        """What Ray and the jobs wrote on all nodes."""
        return "".join(path.read_text(errors="replace") for path in self.folder.rglob("*.*") if path.is_file())

    def _start(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", RAY_START, "start", "--block", "--disable-usage-stats"),
                    *("--node-ip-address", LOOPBACK, "--object-store-memory", str(OBJECT_STORE_BYTES)),
                    # Any free port, so that nodes on one machine do not take each other's.
                    *("--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"),
                    *("--temp-dir", str(self.folder / name), *arguments),
                ],
                env={**self.environment, **(environment or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.nodes[name] = Node(name, process)

    def _get(self, path: str) -> HTTPResponse:
        """The dashboard's answer; sooner than Ray's own command line, which imports for seconds."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=30)
        return answer

    def _up(self) -> bool:
        try:
            self._get("/api/version").close()
        except OSError:
            return False
        return True

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not done():
            for name, node in self.nodes.items():
                if node.process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {(self.folder / f'{name}.out').read_text()[-3000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come up")
            time.sleep(0.3)
