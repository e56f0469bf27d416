"""`graft gc`: what no run refers to goes, all else stays, whoever works meanwhile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from graftwork.pipeline.cli.app import app
from graftwork.pipeline.planning.contents import Contents, read_snapshot
from graftwork.pipeline.runs import gc, record
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import Lease as HeldLease
from graftwork.pipeline.store.leases import LeaseOwner, take
from graftwork.pipeline.store.manifest import MANIFEST, RottenArtifact
from graftwork.specs.reading.load import SpecError
from tests.stores import FILES, KEY, OTHER, commit, overwrite, remove, stored

THIRD = "3" * 64


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Two artifacts: KEY belongs to a run, OTHER to none."""
    found: Store = request.getfixturevalue("s3") if request.param == "s3" else Store(str(tmp_path / "store"))
    commit(found)
    commit(found, OTHER)
    save_run(found, "digits-1", KEY)
    return found


def save_run(store: Store, run: str, *keys: str, job: dict[str, Any] | None = None) -> None:
    steps = [StepRecord(name=f"step/{number}", key=key, state="done") for number, key in enumerate(keys)]
    one = RunRecord(
        run=run, name="digits", status="finished", started="2025-11-20T22:00:00Z", job=job or {}, steps=steps
    )
    record.save(store, one)


def collect(store: Store, older_than: float = 0.0, forget: tuple[str, ...] = ()) -> list[str]:
    """Free all garbage; returns the places."""
    return [one.place for one in gc.free(store, gc.garbage(store, older_than, forget), forget)]


def graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_an_artifact_that_no_run_refers_to_goes_and_the_others_stay(store: Store) -> None:
    assert collect(store) == [f"artifacts/{OTHER}"]
    assert (store.state(KEY), store.state(OTHER)) == ("cached", "pending")
    assert not [name for name in stored(store) if OTHER in name]
    store.artifact(KEY).verify()


def test_what_is_young_stays(store: Store) -> None:
    assert collect(store, older_than=60.0) == [] and store.state(OTHER) == "cached"


def test_nothing_is_freed_unless_it_is_asked_for(store: Store) -> None:
    before = stored(store)
    done = graft("gc", "--store", store.url, "--older-than", "0")
    assert done.exit_code == 0, done.output
    assert f"artifacts/{OTHER}" in done.stdout and "would free: " in done.stdout
    assert f"free it with: graft gc --store {store.url} --older-than 0 --yes" in done.stdout
    assert stored(store) == before
    done = graft("gc", "--store", store.url, "--older-than", "0", "--yes", "--json")
    told = json.loads(done.stdout)
    assert [piece["place"] for piece in told["pieces"]] == [f"artifacts/{OTHER}"] and told["done"]
    assert told["size"] == sum(len(content) for name, content in before.items() if OTHER in name)
    assert stored(store) == {name: content for name, content in before.items() if OTHER not in name}


def test_checkpoints_that_a_run_may_go_on_from_stay(store: Store) -> None:
    save_run(store, "digits-2", THIRD)
    for key in (THIRD, "4" * 64):
        store.partial(key).save("training", lambda path: path.write_bytes(b"1"))
    assert set(collect(store)) == {f"artifacts/{OTHER}", f"partial/{'4' * 64}"}
    assert store.state(THIRD) == "partial"


def test_what_kills_and_damage_left_behind_goes(store: Store) -> None:
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"beside its artifact"))
    commit(store, THIRD)
    aside = store.quarantine(THIRD)
    overwrite(store, f"artifacts/{THIRD}/model.safetensors", b"half a commit")
    places = {f"partial/{KEY}", aside, f"artifacts/{THIRD}", f"artifacts/{OTHER}"}
    if store.local:
        overwrite(store, ".drafts/tmp123", b"half a document")
        overwrite(store, ".drafts/tmp456/draft", b"half a checkpoint")
        places |= {".drafts/tmp123", ".drafts/tmp456"}
    assert set(collect(store)) == places
    assert {name.split("/")[0] for name in stored(store)} == {"artifacts", "runs"}


def test_what_is_remembered_of_files_goes_when_no_run_reads_them(store: Store, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("read", "shards", "unread")}
    for place in places.values():
        place.mkdir()
        (place / "file").write_bytes(b"content")
        contents = Contents(store)
        contents.files("weights.path", place, ["file"])
        contents.keep()
    job = {"data": {"path": str(places["read"])}, "weights": {"path": str(places["shards"] / "of-2.safetensors")}}
    save_run(store, "digits-1", KEY, job=job)
    store.files.write("contents/torn", b"half a snapshot")
    gone = [place for place in collect(store) if place.startswith("contents/")]
    assert "contents/torn" in gone and len(gone) == 2
    left = {read_snapshot(store, f"contents/{name}") for name in store.names("contents")}
    assert {one.path for one in left if one} == {str(places["read"]), str(places["shards"])}


def test_an_upload_that_was_abandoned_goes(s3: Store) -> None:
    bucket, _, prefix = str(s3.root).partition("/")
    for key in (f"{prefix}/artifacts/{KEY}/model.safetensors", "elsewhere"):
        upload = s3.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        s3.fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")
    (found,) = gc.garbage(s3, 0.0)
    assert (found.kind, found.place, found.size) == ("upload", f"artifacts/{KEY}/model.safetensors", 4)
    collect(s3)
    left = s3.fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere"]


def test_what_is_leased_stays(store: Store) -> None:
    lease = take(store, OTHER, LeaseOwner.me("digits-9", "task"))
    assert isinstance(lease, HeldLease)
    overwrite(store, f"partial/{OTHER}/training.0123", b"a checkpoint")
    assert collect(store) == []
    lease.release()
    assert set(collect(store)) == {f"artifacts/{OTHER}", f"partial/{OTHER}"}


def test_a_lease_that_is_not_renewed_for_an_hour_keeps_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    commit(store, OTHER)
    lease = take(store, OTHER, LeaseOwner(run="digits-9", task="task", host="another", machine="another", process=1))
    assert isinstance(lease, HeldLease)
    lease._ended.set()  # its machine is gone
    assert collect(store) == []
    (file,) = Path(store.root / "leases").iterdir()
    os.utime(file, times=(time.time() - 4000,) * 2)
    assert set(collect(store)) == {f"artifacts/{OTHER}", f"leases/{file.name}"}


def test_forgetting_a_run_frees_what_it_alone_refers_to_at_any_age(store: Store) -> None:
    commit(store, THIRD)
    save_run(store, "digits-2", THIRD, KEY)
    store.write("outbox/digits-2.jsonl", "")
    assert collect(store, older_than=60.0, forget=("digits-2",)) == [f"artifacts/{THIRD}"]
    assert store.runs() == ["digits-1"] and not [name for name in stored(store) if "digits-2" in name]
    assert (store.state(KEY), store.state(THIRD)) == ("cached", "pending")


def test_the_listing_says_what_forgetting_each_run_would_free(store: Store) -> None:
    commit(store, THIRD)
    save_run(store, "digits-2", THIRD, KEY)
    size = sum(len(content) for content in FILES.values())
    told = {one.run: (one.size, one.alone) for one in gc.holdings(store)}
    assert told == {"digits-1": (size, 0), "digits-2": (2 * size, size)}
    done = graft("gc", "--store", store.url, "--forget", "digits-2")
    assert "would forget: digits-2" in done.stdout and "--forget digits-2 --yes" in done.stdout
    assert store.runs() == ["digits-1", "digits-2"]


@pytest.mark.parametrize("name", [KEY, record.lease_name("digits-1")])
def test_a_run_that_is_at_work_is_not_forgotten(store: Store, name: str) -> None:
    lease = take(store, name, LeaseOwner.me("digits-1", "task"))
    assert isinstance(lease, HeldLease)
    with pytest.raises(SpecError, match="accepted: a run that has stopped"):
        gc.garbage(store, 0.0, ("digits-1",))
    lease.release()


def test_a_run_that_is_not_there_is_not_forgotten(store: Store) -> None:
    done = graft("gc", "--store", store.url, "--forget", "nonsense")
    assert done.exit_code == 2 and "run: got 'nonsense', no such run" in done.stderr


def test_what_a_job_has_come_to_refer_to_meanwhile_stays(store: Store) -> None:
    commit(store, THIRD)
    found = gc.garbage(store, 0.0)
    freed = gc.free(store, found)
    first = next(freed)
    late = next(one for one in found if one != first)
    save_run(store, "digits-2", str(late.key))
    assert list(freed) == [] and store.state(str(late.key)) == "cached"


def test_a_manifest_goes_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(store.files, "remove", removed.append)
    collect(store)
    assert removed[0] == f"artifacts/{OTHER}/{MANIFEST}"


def test_a_job_that_misses_what_it_has_just_seen_can_compute_it_again(store: Store) -> None:
    artifact = store.artifact(OTHER)
    artifact.path()
    collect(store)
    with pytest.raises(RottenArtifact) as missing:
        artifact.path()
    store.quarantine(missing.value.key)  # as a run does with what it finds rotten
    assert store.state(OTHER) == "pending"
    commit(store, OTHER)
    store.artifact(OTHER).path()


def test_an_artifact_without_its_manifest_is_no_artifact_of_a_run(store: Store) -> None:
    remove(store, f"artifacts/{KEY}/{MANIFEST}")
    assert f"artifacts/{KEY}" in collect(store)
