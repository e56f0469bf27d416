"""Workers that fork from a warm process are what they would have been by themselves, and end when they should."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from graftwork.cluster.session.imports import without
from graftwork.cluster.session.warm import Nursery

pytestmark = pytest.mark.skipif(not Nursery.possible(), reason="needs Linux")

TELL = """
import json, os, sys
told = {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "argv": sys.argv, "folder": os.getcwd(),
        "VARIABLE": os.environ.get("VARIABLE"), "warm": "json.tool" in sys.modules, "main": __name__}
print(json.dumps(told), flush=True)
"""
WAIT = TELL + "import time\ntime.sleep(60)\n"


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with closing(Nursery(["json.tool"])) as made:
        yield made


def start(nursery: Nursery, folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """As Ray does it: by a shell that becomes the executable."""
    (folder / "worker.py").write_text(code)
    command = f"exec {nursery.py_executable} {shlex.join([str(folder / 'worker.py'), *arguments])}"
    return subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "VARIABLE": "äß"},
    )


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_has_its_command_environment_files_and_folder_and_what_the_nursery_imported(
    nursery: Nursery, tmp_path: Path
) -> None:
    for _ in range(2):
        process = start(nursery, tmp_path, TELL, "one", "two words")
        said = told(process)
        assert process.wait(30) == 0
        assert said["argv"] == [str(tmp_path / "worker.py"), "one", "two words"]
        assert said["folder"] == str(tmp_path) and said["VARIABLE"] == "äß" and said["main"] == "__main__"
        assert said["parent"] not in (process.pid, os.getpid())
    assert said["warm"]
    assert said["group"] == said["pid"]  # Ray ends a worker with its group


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('broken')", 1),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
    ids=["good", "exit", "error", "killed"],
)
def test_a_worker_s_end_is_the_end_of_what_ray_started(
    nursery: Nursery, tmp_path: Path, code: str, expected: int
) -> None:
    process = start(nursery, tmp_path, code)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == expected
    assert ("ValueError: broken" in errors) == (expected == 1)


def test_what_ray_kills_is_the_worker(nursery: Nursery, tmp_path: Path) -> None:
    process, other = start(nursery, tmp_path, WAIT), start(nursery, tmp_path, WAIT)
    pid, alive = told(process)["pid"], told(other)["pid"]
    process.kill()
    wait_for(lambda: gone(pid))
    assert not gone(alive)
    other.terminate()  # which a worker may answer
    assert other.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: gone(alive))


def test_no_worker_outlives_the_nursery_and_those_after_it_start_by_themselves(tmp_path: Path) -> None:
    nursery = Nursery(["json.tool"])
    process = start(nursery, tmp_path, WAIT)
    pid = told(process)["pid"]
    nursery.close()
    wait_for(lambda: gone(pid))
    assert process.wait(30) != 0
    alone = start(nursery, tmp_path, TELL)
    said = told(alone)
    assert said["pid"] == alone.pid and not said["warm"]


def test_a_nursery_goes_with_who_started_it(tmp_path: Path) -> None:
    code = "from graftwork.cluster.session.warm import Nursery\n"
    code += "n = Nursery([]); print(n._process.pid, flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    wait_for(lambda: gone(pid))


@pytest.mark.parametrize("module", ["threaded", "ray"])
def test_a_nursery_that_cannot_fork_leaves_workers_to_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
    (tmp_path / f"{module}.py").write_text(code if module == "threaded" else "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with closing(Nursery([module])) as nursery:

        def by_itself() -> bool:
            process = start(nursery, tmp_path, TELL)
            alone = bool(told(process)["pid"] == process.pid)
            assert process.wait(30) == 0
            return alone

        wait_for(by_itself)


def test_what_the_nursery_cannot_import_is_left_to_who_needs_it(tmp_path: Path) -> None:
    with closing(Nursery(["there.is.none", "json.tool"])) as nursery:

        def warm() -> bool:
            process = start(nursery, tmp_path, TELL)
            said = told(process)
            assert said["pid"] != process.pid and process.wait(30) == 0
            return bool(said["warm"])

        wait_for(warm)


def test_what_is_imported_without_a_module_does_not_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wanted_by_none.py").write_text("")
    with without("wanted_by_none"), pytest.raises(ImportError):
        import wanted_by_none  # type: ignore[import-not-found]
    import wanted_by_none

    with without("wanted_by_none"):
        assert sys.modules["wanted_by_none"] is wanted_by_none


def test_deepspeed_s_engine_comes_without_mlflow() -> None:
    loaded = "print('mlflow' in sys.modules)"
    code = (
        f"import sys, graftwork.cluster.training.deepspeed_engine; {loaded}; import mlflow; print(mlflow.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2] == "False"
