"""A store without room, or that may not be written: one line, nothing lost, and it goes on when there is room."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.pipeline import api
from graftwork.pipeline.execution.report import RecordWriter
from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.store.errors import StoreError, told_by
from tests.conftest import GRAFT, ROOT, TINY, Finished

ON_A_SMALL_DISK = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"', "sh"]

FULL = """
import json, sys
from pathlib import Path
from graftwork.pipeline import api
from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.artifacts import Store
from tests.stores import FILES, KEY, ORIGIN, OTHER, commit

disk = Path(sys.argv[1])
store = Store(str(disk / "store"))
commit(store)
store.partial(OTHER).save("training", lambda path: path.write_bytes(b"first"))
out = store.workplace(OTHER)
(out / "model.safetensors").write_bytes(b"x" * 2**20)

def fill():
    with (disk / "filler").open("wb", buffering=0) as filler:
        for size in (2**16, 4096):
            try:
                while filler.write(b"x" * size):
                    pass
            except OSError:
                pass

def told(work):
    try:
        work()
    except OSError as error:
        return str(store.explain(error))

fill()
lines = [
    told(lambda: store.commit(OTHER, out, {}, ORIGIN)),
    told(lambda: store.partial(OTHER).save("training", lambda path: path.write_bytes(b"x" * 2**20))),
    told(lambda: store.write_run("digits", "{}")),
    told(store.check_writable),
]
states = [store.state(KEY), store.state(OTHER)]
store.artifact(KEY).verify()
kept = store.partial(OTHER).load("training").read_bytes().decode()
(disk / "filler").unlink()
out = store.workplace(OTHER)
(out / "model.safetensors").write_bytes(b"x" * 2**20)
store.commit(OTHER, out, {}, ORIGIN)
store.artifact(OTHER).verify()
print(json.dumps({"lines": lines, "states": states, "kept": kept, "drafts": store.names(".drafts")}))
"""

READ_ONLY = """
import subprocess, sys
from pathlib import Path
from graftwork.pipeline.store.artifacts import Store
from tests.stores import KEY, OTHER, commit

disk = Path(sys.argv[1])
store = Store(str(disk / "store"))
commit(store)
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
for work in (store.check_writable, lambda: commit(store, OTHER)):
    try:
        work()
    except OSError as error:
        print(store.explain(error))
store.artifact(KEY).verify()
subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
commit(store, OTHER)
store.artifact(OTHER).verify()
"""


SHARD = """
import sys
from pathlib import Path
import numpy as np
from graftwork.stages.artifacts.latents import ShardWriter

disk = Path(sys.argv[1])
writer = ShardWriter(disk / "training_latents-00000.npy", (2048, 4, 32, 32))
try:
    for start in range(0, 2048, 64):
        writer.write(start, np.ones((64, 4, 32, 32), np.float32))
except OSError as error:
    print(start, error.strerror)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small disk can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    tried = subprocess.run([*ON_A_SMALL_DISK, "1m", str(place), "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {tried.stderr.decode().strip()}")
    return place


def on_a_disk(disk: Path, size: str, code: str) -> str:
    command = [*ON_A_SMALL_DISK, size, str(disk), sys.executable, "-c", code, str(disk)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_up_is_told_and_nothing_is_lost(disk: Path) -> None:
    found = json.loads(on_a_disk(disk, "4m", FULL))
    for line in found["lines"]:
        assert line.startswith(f"store: got '{disk}/store', where there is no room (No space left on device"), line
        assert line.endswith("; free room there, then resume") and "\n" not in line
    assert found["states"] == ["cached", "partial"]  # nothing of the commit is visible, and nothing of the save
    assert found["kept"] == "first"
    assert found["drafts"] == []


def test_latents_that_find_no_room_are_an_error_and_no_dead_worker(disk: Path) -> None:
    """Of a mapped file the system would take the pages back with a signal."""
    assert on_a_disk(disk, "4m", SHARD).split(" ", 1) == ["192", "No space left on device\n"]


def test_a_store_that_cannot_be_written_is_told_and_can_be_read(disk: Path) -> None:
    lines = on_a_disk(disk, "4m", READ_ONLY).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"store: got '{disk}/store', which cannot be written: Read-only file system"), line


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError("262144 requested and 8192 written"),  # numpy's
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors'
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_told_as_that(error: Exception) -> None:
    told = told_by("/store", error)
    assert isinstance(told, StoreError) and told.remedy == "free room there, then resume"


def test_another_error_is_not_blamed_on_the_store() -> None:
    assert told_by("/store", ValueError("a loss")) is None
    assert told_by("/store", PermissionError(13, "Permission denied", "/photos/cat.png")) is None
    assert told_by("/store", PermissionError(13, "Permission denied", "/store/partial/x")) is not None


def test_a_run_whose_record_cannot_be_kept_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    view = SilentView()
    monkeypatch.setattr(view, "say", said.append)
    run = Run(api.plan(TINY, [f"store={tmp_path / 'store'}"]), view)
    writer = RecordWriter(run.store, run.record, view.say)
    run.store.write("runs", "a file is in the way")
    for _ in range(2):
        writer.save()
    (line,) = said
    assert line.startswith(
        f"the record of this run is not kept: store: got '{tmp_path}/store', which cannot be written"
    )
    run.store.remove("runs")
    writer.save()
    assert run.store.runs() == [run.record.run]


JOB = """
import hashlib, json, os, shutil, subprocess, sys
from pathlib import Path

disk, graft, job, distilled, free = Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
store = disk / ".graftwork"
shutil.copytree(distilled, store)
room = os.statvfs(disk)
(disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - free))

def call(*command):
    done = subprocess.run([graft, *command], cwd=disk, capture_output=True, text=True, check=False)
    return {"code": done.returncode, "out": done.stdout, "told": done.stderr}

full = call("run", job)
(disk / "filler").unlink()
verified = call("verify")
resumed = call("run", job, "--json")
weights = {}
for path in sorted((store / "artifacts").glob("*/model.safetensors")):
    weights[path.parent.name] = hashlib.sha256(path.read_bytes()).hexdigest()
print(json.dumps({"full": full, "verified": verified, "resumed": resumed, "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("free", [400_000, 2_500_000], ids=["before its first step", "in the midst"])
def test_a_job_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    disk: Path, tiny: Finished, distilled: Path, free: int
) -> None:
    given = [GRAFT, str(TINY), str(distilled), str(free)]
    command = [*ON_A_SMALL_DISK, "64m", str(disk), sys.executable, "-c", JOB, str(disk), *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    full = found["full"]
    assert full["code"] == 1 and "Traceback" not in full["told"], full["told"]
    told = [line for line in full["told"].splitlines() if line.startswith("graft: ")]
    assert any("there is no room" in line and "free room there, then resume" in line for line in told), full["told"]
    assert found["verified"]["code"] == 0, found["verified"]
    assert found["resumed"]["code"] == 0, found["resumed"]["told"]
    wanted = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tiny.store / "artifacts").glob("*/model.safetensors")
    }
    assert found["weights"] == wanted
