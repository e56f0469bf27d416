"""Servers that tests start on loopback beside a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

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
            # Its processes for jobs of evaluation, which nobody here sends, each import all of MLflow.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
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


class WebServer:
    """A web server that gives one answer to all requests, or passes them on as a proxy does.

    `fail_on`: requests with these bytes in their body get the answer nonetheless. `asked`: the paths of all requests.
    """

    def __init__(self, status: int = 200, body: str = "", headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body.encode(), headers or {}
        self.forward_to: str | None = None
        self.fail_on: bytes | None = None
        self.pause = 0.0  # seconds before an answer
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.asked.append(self.path)
                server.authorizations.append(self.headers.get("Authorization"))
                time.sleep(server.pause)
                if server.forward_to and not (server.fail_on and server.fail_on in body):
                    self._send(*server.forwarded(self.command, self.path, body, dict(self.headers)))
                else:
                    self._send(server.status, server.body, server.headers)

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None: ...

        self.http = Quiet((LOOPBACK, 0), Handler)
        self.address = f"http://{LOOPBACK}:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def forwarded(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        """The answer of the server behind, whatever host the request was for."""
        parts = urlsplit(path)
        url = f"{self.forward_to}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        passed = {name: value for name, value in headers.items() if name.lower() in ("content-type", "authorization")}
        request = urllib.request.Request(url, data=body or None, method=method, headers=passed)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return answer.status, answer.read(), {"Content-Type": answer.headers["Content-Type"]}
        except urllib.error.HTTPError as error:
            return error.code, error.read(), {"Content-Type": error.headers["Content-Type"]}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
