"""Workers that fork from a warm process: what steps import is imported once a session, not once a process.

Importing torch, DeepSpeed and matplotlib takes 2 to 4 s of a core, in each of the ten processes of a small job. Here
one process, the nursery, imports them while Ray starts. Ray is told, by its setting `py_executable`, to start workers
with this file (`main`): it hands its command, environment and files to the nursery, which forks a process that goes on
as that command, and stays to pass on signals and the end. Without a nursery it becomes the command itself.

For a Ray on this machine, under Linux and without GPUs only: a CUDA driver that is loaded does not outlive a fork. Nor
does Ray: the nursery must not have imported it.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys

# Started for every worker, with nothing of site-packages on its path: all else is imported where it is used.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, NoReturn

NUM_FILES = 3  # standard input, output and error of a worker


def main(address: str, command: Sequence[str]) -> NoReturn:
    """Be the worker that Ray started: in a process forked by the nursery at `address`, or, without one, in this one."""
    import signal

    nursery = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    answers, worker = nursery.makefile("r"), 0
    try:
        nursery.connect("\0" + address)
        request = json.dumps({"command": command, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        files = array.array("i", range(NUM_FILES))
        nursery.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files.tobytes())])
        nursery.sendall(request)
        worker = int(answers.readline() or "0")
    except OSError:
        pass
    if not worker:  # the nursery is gone, or cannot fork
        os.execv(sys.executable, [sys.executable, *command])
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(worker, number))
    try:
        code = int(answers.readline() or "-9")
    except OSError:
        code = -9  # the nursery is gone, and the worker with it
    os._exit(code if code >= 0 else 128 - code)


class Nursery:
    """The warm process, as seen by who started it. `py_executable` is for Ray's runtime environment."""

    def __init__(self, modules: Iterable[str], folders: Sequence[str] = ()) -> None:
        """folders: where to search for modules before those that Python searches by itself."""
        import shlex
        import subprocess
        import uuid

        address = f"graftwork-{uuid.uuid4().hex}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind("\0" + address)
        listening.listen(128)  # who comes before the nursery is up waits
        # Threads do not outlive a fork. As many for sums as Ray gives its workers; none that tidies Arrow's memory.
        alone = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false", "DS_ACCELERATOR": "cpu"}
        searched = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: without the current folder, whose `torch.py` would be taken for torch.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "graftwork.cluster.session.warm",
                "--serve",
                str(listening.fileno()),
                *modules,
            ],
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,  # its life line: it ends when that does, whatever becomes of this process
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what fails here is told by the workers, which then import for themselves
            env={**os.environ, **alone, "PYTHONPATH": os.pathsep.join(searched)},
            start_new_session=True,
        )
        listening.close()
        self.py_executable = shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__), address])

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux" and hasattr(os, "pidfd_open")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(listening: socket.socket, modules: Sequence[str]) -> None:
    """Fork a process for each request, until standard input ends; import the modules in between, one at a time."""
    import importlib
    import selectors
    from contextlib import suppress

    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(listening, selectors.EVENT_READ)
    workers, cold = _Workers(selector), list(modules)
    try:
        while True:
            for ready, _ in selector.select(timeout=0 if cold else None):
                if ready.fileobj is sys.stdin:
                    return
                if ready.fileobj is listening:
                    client, _ = listening.accept()
                    workers.fork(client)
                elif ready.data is not None:
                    ready.data()
            if cold:
                with suppress(Exception):  # the worker that needs it will say what is wrong
                    importlib.import_module(cold.pop(0))
                if len(os.listdir("/proc/self/task")) > 1 or "ray" in sys.modules:  # neither outlives a fork
                    selector.unregister(listening)
                    listening.close()  # from now on workers start by themselves
                    cold.clear()
    finally:
        workers.kill()


class _Workers:
    """The processes that were forked, each with the client that stands for it with Ray."""

    def __init__(self, selector: Any) -> None:
        self._selector = selector
        self._alive: dict[int, int] = {}  # pid -> pidfd

    def fork(self, client: socket.socket) -> None:
        import gc
        import selectors
        from functools import partial

        request, files = _received(client)
        if request is None:
            client.close()
            return
        gc.freeze()  # so that collecting garbage does not touch, and copy, what processes share
        pid = os.fork()
        if pid == 0:
            client.close()
            self._let_go()
            _become(request, files)
        for file in files:
            os.close(file)
        pidfd = os.pidfd_open(pid)
        self._alive[pid] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, partial(self._ended, pid, client))
        self._selector.register(client, selectors.EVENT_READ, partial(self._left, pid, client))
        _tell(client, pid)

    def _let_go(self) -> None:
        """In a process that was forked: of what belongs to the nursery."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif isinstance(key.fileobj, int):
                os.close(key.fileobj)
        self._selector.close()

    def _ended(self, pid: int, client: socket.socket) -> None:
        pidfd = self._alive.pop(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        if client.fileno() >= 0:  # it has not left before
            self._selector.unregister(client)
            _tell(client, os.waitstatus_to_exitcode(status))
            client.close()

    def _left(self, pid: int, client: socket.socket) -> None:
        """Ray killed the client: it means the worker."""
        if client.fileno() < 0:  # the worker ended in the same moment
            return
        self._selector.unregister(client)
        client.close()
        self._kill(pid)

    def _kill(self, pid: int) -> None:
        import signal
        from contextlib import suppress

        if pid in self._alive:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._alive[pid], signal.SIGKILL)

    def kill(self) -> None:
        for pid in self._alive:
            self._kill(pid)


def _tell(client: socket.socket, number: int) -> None:
    from contextlib import suppress

    with suppress(OSError):  # it was killed
        client.sendall(f"{number}\n".encode())


def _received(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    size = array.array("i").itemsize
    head, extra, *_ = client.recvmsg(8, socket.CMSG_SPACE(NUM_FILES * size))
    files = array.array("i")
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % size])
    text = client.makefile("rb").read(int.from_bytes(head, "big")) if len(head) == 8 else b""
    return (json.loads(text) if text else None), list(files)


def _become(request: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Go on as the command of a request, in its environment."""
    import runpy

    code = 1
    try:
        os.setpgid(0, 0)  # Ray ends a worker with its group
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        script, *_ = sys.argv = request["command"]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    else:
        main(sys.argv[1], sys.argv[2:])
