"""A store on S3: whole or not there, through an unreliable network, in little memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

from graftwork.pipeline.cli.app import app
from graftwork.pipeline.store import open, remote
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.manifest import MANIFEST
from tests.conftest import ROOT, TINY
from tests.flaky import FAULTS, Fault, Plan, Proxy, flaky, seeded
from tests.stores import FILES, KEY, OTHER, commit, flip, stored

MIB = 2**20


@contextmanager
def through_a_proxy(store: Store, monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Iterator[tuple[Store, Proxy]]:
    """The same store behind a proxy that spoils requests, and little patience with it."""
    monkeypatch.setattr(open, "READ_TIMEOUT", 1)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.2)
    monkeypatch.setattr(open, "REQUEST_TRIES", 1)
    monkeypatch.setattr(remote, "PART_BYTES", 5 * MIB)  # the least that S3 takes
    with flaky(os.environ["AWS_ENDPOINT_URL"], plan, stall_seconds=1.5) as proxy:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("AWS_ENDPOINT_URL", proxy.url)
            S3FileSystem.clear_instance_cache()
            behind = Store(store.url)
            behind.fs.connect()
        S3FileSystem.clear_instance_cache()
        yield behind, proxy


# -- an unreliable network


@pytest.mark.parametrize("seed", range(3))
def test_everything_comes_through_an_unreliable_network(s3: Store, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    large = os.urandom(11 * MIB)  # three parts
    with through_a_proxy(s3, monkeypatch, seeded(seed, share=0.25)) as (store, proxy):
        store.write_run("digits", "{}")
        store.write_run("digits", '{"status": "running"}')
        assert store.create("leases/a/0.json", "mine") and not store.create("leases/a/0.json", "yours")
        store.partial(KEY).save("training", lambda path: path.write_bytes(b"first"))
        store.partial(KEY).save("training", lambda path: path.write_bytes(large))
        loaded = store.partial(KEY).load("training")
        assert loaded is not None and loaded.read_bytes() == large
        commit(store, KEY, {"model.safetensors": large, "meta.json": b"{}"})
        commit(store, OTHER)
        store.artifact(KEY).verify()
        assert (store.artifact(KEY).path() / "model.safetensors").read_bytes() == large
        assert store.artifact(OTHER).read("figures/loss.svg") == FILES["figures/loss.svg"]
        assert [manifest.key for manifest in store.manifests()] == sorted([KEY, OTHER])
        assert store.state(KEY) == "cached" and store.runs() == ["digits"]
        aside = store.quarantine(OTHER)
        store.remove("leases/a/0.json")
    assert len(proxy.spoiled) >= 8, proxy.spoiled
    there = stored(s3)
    assert {name for name in there if not name.startswith("rotten/")} == {
        "runs/digits.json", *(f"artifacts/{KEY}/{name}" for name in ("model.safetensors", "meta.json", MANIFEST)),
    }  # fmt: skip
    assert there["runs/digits.json"] == b'{"status": "running"}'
    assert there[f"artifacts/{KEY}/model.safetensors"] == large
    assert {name: there[f"{aside}/{name}"] for name in FILES} == FILES


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_that_passes_is_survived(s3: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    turns = iter([fault, None] * 100)
    with through_a_proxy(s3, monkeypatch, lambda _: next(turns)) as (store, proxy):
        store.write("runs/a.json", "x" * 5000)
        assert store.read("runs/a.json") == "x" * 5000
        assert store.create("leases/a.json", "mine")  # although the answer may be lost: it sees that it is its own
    assert proxy.spoiled.count(fault) >= 2  # half of an empty answer is the whole


@pytest.mark.parametrize("fault", ["500", "slow down", "lost request", "half an answer"])
def test_a_fault_that_stays_ends_in_one_line_that_says_what_was_tried(
    s3: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    commit(s3)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
    with through_a_proxy(s3, monkeypatch, lambda _: fault) as (store, proxy), pytest.raises(StoreError) as caught:
        store.read_run("digits") if fault == "half an answer" else commit(store, OTHER)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"store: got {s3.url!r}, which does not answer as it should: ")
    assert int(re.findall(r"failed (\d+) times", line)[0]) >= 3 and len(proxy.spoiled) >= 3
    assert {name for name in stored(s3) if OTHER in name} == set()


def test_a_large_upload_that_ended_unheard_is_whole(s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Fault] = ["lost answer"]

    def plan(request: str) -> Fault | None:
        return lost.pop() if lost and request.startswith("POST ") and "uploadId=" in request else None

    large = tmp_path / "large"
    large.write_bytes(content := os.urandom(11 * MIB))
    with through_a_proxy(s3, monkeypatch, plan) as (store, _):
        store.files.put(large, "large")
    assert not lost and stored(s3) == {"large": content}


def test_what_others_write_is_listed_at_once(s3: Store) -> None:
    s3.write("leases/a/0.json", "ours")
    assert (s3.names("leases"), s3.names("leases/a"), s3.runs()) == (["a"], ["0.json"], [])
    S3FileSystem.clear_instance_cache()
    other = Store(s3.url)
    assert other.fs is not s3.fs
    for name in ("leases/a/1.json", "leases/b/0.json", "runs/digits.json"):
        other.write(name, "theirs")
    assert (s3.names("leases"), s3.names("leases/a"), s3.runs()) == (["a", "b"], ["0.json", "1.json"], ["digits"])
    other.remove("leases/a/0.json")
    assert s3.names("leases/a") == ["1.json"] and len(s3.files.tree("leases")) == 2


def test_what_does_not_pass_is_not_tried_again(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with through_a_proxy(s3, monkeypatch, lambda _: None) as (store, proxy):
        assert store.read("runs/none.json") is None
    assert proxy.requests <= 2  # a HEAD and a GET


# -- whole or not there

UPLOAD = """
import sys
from pathlib import Path
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.store import remote
from graftwork.pipeline.store.artifacts import Store
remote.PART_BYTES, remote.PARTS_AT_ONCE = 5 * 2**20, 1
Store(sys.argv[1]).files.put(Path(sys.argv[2]), "artifacts/key/model.safetensors")
"""


def test_a_kill_in_the_midst_of_an_upload_leaves_nothing_visible(s3: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(200 * MIB)
    upload = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, s3.url, str(large)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while not (begun := s3.files.uploads()) or begun["artifacts/key/model.safetensors"].size < 5 * MIB:
        assert upload.poll() is None and time.monotonic() < deadline, "no part was uploaded"
        time.sleep(0.02)
    upload.send_signal(signal.SIGKILL)
    upload.wait()
    assert stored(s3) == {} and s3.keys() == []
    assert large.exists()


# -- one holder


def race(url: str, number: int, barrier: Any, won: Any) -> None:
    store = Store(url)
    store.names("leases")  # connected
    barrier.wait()
    if store.create("leases/a/0.json", f"process {number}"):
        won.put(number)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_four_that_create_a_document_at_once_one_wins(place: str, s3: Store, tmp_path: Path) -> None:
    store = s3 if place == "s3" else Store(str(tmp_path / "store"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s3fs", "graftwork.pipeline.store.artifacts"])
    barrier, won = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(store.url, number, barrier, won)) for number in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    winner = won.get(timeout=5)
    assert won.empty() and store.read("leases/a/0.json") == f"process {winner}"


# -- memory

LARGE = """
import resource, sys
from pathlib import Path
from graftwork.pipeline.store.manifest import FileEntry, digest
from graftwork.pipeline.store.artifacts import Store
store, path = Store(sys.argv[1]), Path(sys.argv[2])
store.write("runs/a.json", "{}")  # the libraries are there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size, sha256 = path.stat().st_size, digest(path)
store.files.put(path, "large")
assert store.files.through("large", FileEntry(size=size, sha256=sha256).differs_from) is None
store.files.get("large", path)
assert digest(path) == sha256 and path.stat().st_size == size
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_large_file_goes_there_and_back_in_little_memory(s3: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for piece in range(100):
            file.write(hashlib.sha256(str(piece).encode()).digest() * (MIB // 32))
    done = subprocess.run(
        [sys.executable, "-c", LARGE, s3.url, str(large)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 80, "MiB"


# -- a clear no


def test_a_bucket_that_does_not_exist_is_one_line(s3: Store) -> None:
    store = Store("s3://no-such-bucket/prefix")
    for call in (store.check_writable, store.runs, lambda: store.write("runs/a.json", "")):
        with pytest.raises(StoreError, match="whose bucket does not exist; accepted: a bucket that exists"):
            call()


@pytest.mark.usefixtures("s3")
def test_a_run_with_a_bucket_that_does_not_exist_ends_before_it_begins() -> None:
    url = "s3://no-such-bucket/prefix"
    done = CliRunner().invoke(
        app, ["run", str(TINY), "--set", f"store={url}", "--set", "tracking.uri=http://127.0.0.1:1"]
    )
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr == f"graft: store: got {url!r}, whose bucket does not exist; accepted: a bucket that exists\n"


def test_no_credentials_are_one_line(s3: Store, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true"}
    code = f"from graftwork.pipeline.store.artifacts import Store; Store({s3.url!r}).runs()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert f"store: got {s3.url!r}, for which there are no credentials; accepted: AWS_ACCESS_KEY_ID" in last


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense://place", "which cannot be understood"),
        ("gs://bucket/prefix", "whose library is not installed"),
        ("s3://", "which cannot be understood"),
    ],
)
def test_a_store_that_no_library_knows_is_one_line(url: str, told: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(url)
    assert str(caught.value).startswith(f"store: got {url!r}, {told}") and "accepted: " in str(caught.value)


# -- rot in the cache of this machine


def test_a_copy_that_rots_on_this_machine_is_fetched_again(s3: Store) -> None:
    commit(s3)
    copy = s3.artifact(KEY).path() / "model.safetensors"
    copy.write_bytes(flip(copy.read_bytes()))
    s3.artifact(KEY)._verified.clear()  # as in another process
    assert (Store(s3.url).artifact(KEY).path() / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def fetch(url: str, barrier: Any) -> None:
    store = Store(url)
    store.runs()
    barrier.wait()
    for _ in range(3):
        assert (store.artifact(KEY).path() / "model.safetensors").stat().st_size == 8 * MIB
        store.artifact(KEY)._verified.clear()


def test_processes_that_fetch_an_artifact_at_once_all_get_it_whole(s3: Store) -> None:
    commit(s3, KEY, {"model.safetensors": os.urandom(8 * MIB)})
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(3)
    fetching = [context.Process(target=fetch, args=(s3.url, barrier)) for _ in range(3)]
    for process in fetching:
        process.start()
    for process in fetching:
        process.join()
    assert [process.exitcode for process in fetching] == [0] * 3
