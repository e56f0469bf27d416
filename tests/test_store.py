"""The store: an artifact exists whole or not at all, and what is read is what was committed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from graftwork.pipeline.store.artifacts import Artifact, Store
from graftwork.pipeline.store.manifest import MANIFEST, RottenArtifact, canonical
from tests.stores import DAMAGE, FILES, KEY, ORIGIN, OTHER, commit, flip, overwrite, remove, stored

ROOT = Path(__file__).parents[1]


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that is not a local folder; what it downloads stays within the test."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    name = f"/{uuid.uuid4().hex}"
    yield Store(f"memory:/{name}")
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture(params=["local", "remote", "s3"])
def store(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# -- commit and read


def test_what_was_committed_is_read_back(store: Store) -> None:
    commit(store)
    folder = Store(store.url).artifact(KEY).path()
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


@pytest.mark.parametrize("name", FILES)
def test_one_file_is_read_back_alone(store: Store, name: str) -> None:
    commit(store)
    assert store.artifact(KEY).read(name) == FILES[name]


def test_the_manifest_lists_each_file_with_its_size_and_digest(store: Store) -> None:
    commit(store)
    manifest = json.loads(stored(store)[f"artifacts/{KEY}/{MANIFEST}"])
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }


def test_the_manifest_says_what_identifies_the_artifact_and_who_made_it(store: Store) -> None:
    commit(store)
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert (manifest.key, manifest.identity, manifest.origin) == (KEY, {"stage": "distill", "version": 1}, ORIGIN)


def test_the_states_of_a_key_are_pending_partial_and_cached(store: Store) -> None:
    states = [store.state(KEY)]
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"1"))
    states.append(store.state(KEY))
    commit(store)
    assert [*states, store.state(KEY)] == ["pending", "partial", "cached"]


def test_every_committed_artifact_is_listed(store: Store) -> None:
    commit(store)
    commit(store, OTHER)
    assert sorted(manifest.key for manifest in store.manifests()) == sorted([KEY, OTHER])


def test_a_second_commit_of_a_key_replaces_the_first(store: Store) -> None:
    commit(store)
    commit(store, files={"model.safetensors": b"again"})
    assert Store(store.url).artifact(KEY).read("model.safetensors") == b"again"


def test_a_workplace_is_empty_whatever_an_earlier_try_left_in_it(store: Store) -> None:
    (store.workplace(KEY) / "left over").write_text("by a kill")
    assert list(store.workplace(KEY).iterdir()) == []


def test_a_committed_file_is_readable_by_others(local: Store) -> None:
    commit(local)
    assert Path(local.root / "artifacts" / KEY / MANIFEST).stat().st_mode & 0o044 == 0o044


# -- what is not whole


def test_files_without_a_manifest_are_no_artifact(store: Store) -> None:
    commit(store)
    remove(store, f"artifacts/{KEY}/{MANIFEST}")  # as if killed before the last move
    assert store.state(KEY) == "pending" and list(store.manifests()) == []
    with pytest.raises(RottenArtifact):
        store.artifact(KEY).path()


def test_the_manifest_is_written_after_every_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        commit(store)
    monkeypatch.undo()
    assert {f"artifacts/{KEY}/{name}" for name in FILES} <= stored(store).keys()
    assert store.state(KEY) != "cached"


def test_a_commit_after_a_killed_one_is_whole(store: Store) -> None:
    overwrite(store, f"artifacts/{KEY}/model.safetensors", b"half of a kil")
    commit(store)
    Store(store.url).artifact(KEY).verify()


# Each damage, to one of two files: which damage it is has nothing to do with where the file lies.
DAMAGED = list(zip(DAMAGE, itertools.cycle(["model.safetensors", "figures/loss.svg"]), strict=False))


@pytest.mark.parametrize(("damage", "name"), DAMAGED)
class TestDamage:
    def test_is_found_when_the_artifact_is_opened(self, store: Store, name: str, damage: str) -> None:
        commit(store)
        DAMAGE[damage](store, f"artifacts/{KEY}/{name}")
        with pytest.raises(RottenArtifact) as caught:
            store.artifact(KEY).path()
        assert (caught.value.key, caught.value.file) == (KEY, name)
        assert KEY[:12] in str(caught.value) and name in str(caught.value)

    def test_is_found_when_the_file_is_read_alone(self, store: Store, name: str, damage: str) -> None:
        commit(store)
        DAMAGE[damage](store, f"artifacts/{KEY}/{name}")
        with pytest.raises(RottenArtifact) as caught:
            store.artifact(KEY).read(name)
        assert (caught.value.key, caught.value.file) == (KEY, name)

    def test_is_found_by_verify_in_an_artifact_that_was_opened_before(
        self, store: Store, name: str, damage: str
    ) -> None:
        commit(store)
        artifact = store.artifact(KEY)
        artifact.path()
        DAMAGE[damage](store, f"artifacts/{KEY}/{name}")
        with pytest.raises(RottenArtifact) as caught:
            artifact.verify()
        assert (caught.value.key, caught.value.file) == (KEY, name)


@pytest.mark.parametrize("at", [0.1, 0.4, 0.7, 0.95])
def test_a_flipped_byte_in_a_manifest_is_found(store: Store, at: float) -> None:
    commit(store)
    name = f"artifacts/{KEY}/{MANIFEST}"
    overwrite(store, name, flip(stored(store)[name], at))
    with pytest.raises(RottenArtifact) as caught:
        store.artifact(KEY).read("figures/loss.svg")
    assert (caught.value.key, caught.value.file) == (KEY, MANIFEST)


@pytest.mark.parametrize("left", [0, 0.5, 0.99], ids=["emptied", "half", "almost whole"])
def test_a_cut_manifest_is_no_artifact(store: Store, left: float) -> None:
    commit(store)
    name = f"artifacts/{KEY}/{MANIFEST}"
    whole = stored(store)[name]
    overwrite(store, name, whole[: int(len(whole) * left)])
    assert store.state(KEY) == "pending" and list(store.manifests()) == []


def test_a_cut_manifest_is_reported_as_rotten_where_the_artifact_is_needed(store: Store) -> None:
    commit(store)
    overwrite(store, f"artifacts/{KEY}/{MANIFEST}", b'{"key": "')
    with pytest.raises(RottenArtifact) as caught:
        store.artifact(KEY).path()
    assert (caught.value.key, caught.value.file) == (KEY, MANIFEST)


def test_a_file_that_nobody_listed_is_not_served(store: Store) -> None:
    commit(store)
    overwrite(store, f"artifacts/{KEY}/stranger.txt", b"?")
    with pytest.raises(RottenArtifact):
        store.artifact(KEY).read("stranger.txt")


def test_rot_survives_pickling() -> None:
    rot = pickle.loads(pickle.dumps(RottenArtifact(KEY, "model.safetensors", "missing")))
    assert (rot.key, rot.file, rot.problem) == (KEY, "model.safetensors", "missing")


# -- quarantine


def test_quarantine_makes_the_key_pending_again(store: Store) -> None:
    commit(store)
    store.quarantine(KEY)
    assert store.state(KEY) == "pending"
    assert not [name for name in stored(store) if name.startswith("artifacts/")]


def test_quarantine_keeps_what_it_moves_aside(store: Store) -> None:
    commit(store)
    before = {name.removeprefix(f"artifacts/{KEY}/"): content for name, content in stored(store).items()}
    aside = store.quarantine(KEY)
    assert aside.startswith(f"rotten/{KEY}")
    assert {name.removeprefix(f"{aside}/"): content for name, content in stored(store).items()} == before


def test_a_key_can_be_committed_and_read_again_after_quarantine(store: Store) -> None:
    commit(store)
    store.artifact(KEY).path()
    overwrite(store, f"artifacts/{KEY}/model.safetensors", b"rot")
    store.quarantine(KEY)
    commit(store)
    store.artifact(KEY).verify()
    assert (store.artifact(KEY).path() / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_artifact_can_be_set_aside_twice(store: Store) -> None:
    for _ in range(2):
        commit(store)
        store.quarantine(KEY)
    assert len([name for name in stored(store) if name.endswith(MANIFEST)]) == 2


def test_an_artifact_without_a_manifest_can_be_set_aside(store: Store) -> None:
    commit(store)
    remove(store, f"artifacts/{KEY}/{MANIFEST}")
    aside = store.quarantine(KEY)
    assert {f"{aside}/{name}" for name in FILES} == stored(store).keys()


# -- partial work


def test_what_was_saved_is_loaded(store: Store) -> None:
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"state"))
    loaded = Store(store.url).partial(KEY).load("training")
    assert loaded is not None and loaded.read_bytes() == b"state"


def test_what_was_never_saved_is_none(store: Store) -> None:
    assert store.partial(KEY).load("training") is None


def test_a_save_replaces_the_one_before_whole(store: Store) -> None:
    partial = store.partial(KEY)
    partial.save("training", lambda path: path.write_bytes(b"a long first state"))
    partial.save("training", lambda path: path.write_bytes(b"short"))
    loaded = partial.load("training")
    assert loaded is not None and loaded.read_bytes() == b"short"


def test_a_save_that_dies_half_way_leaves_the_one_before(store: Store) -> None:
    def dies(path: Path) -> None:
        path.write_bytes(b"hal")
        raise KeyboardInterrupt

    partial = store.partial(KEY)
    partial.save("training", lambda path: path.write_bytes(b"first"))
    with pytest.raises(KeyboardInterrupt):
        partial.save("training", dies)
    loaded = partial.load("training")
    assert loaded is not None and loaded.read_bytes() == b"first"


def test_workers_of_one_machine_that_load_at_once_fetch_once(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.partial(KEY).save("training", lambda path: path.write_bytes(b"state"))
    fetched: list[str] = []
    fetch = remote.files.get

    def slow(name: str, path: Path) -> None:
        fetched.append(name)
        time.sleep(0.1)
        fetch(name, path)

    monkeypatch.setattr(remote.files, "get", slow)
    with ThreadPoolExecutor(4) as workers:
        loaded = list(workers.map(lambda _: remote.partial(KEY).load("training"), range(4)))
    assert [path and path.read_bytes() for path in loaded] == [b"state"] * 4
    assert len(fetched) == 1


def test_partial_work_of_one_key_is_not_that_of_another(store: Store) -> None:
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"1"))
    assert store.state(OTHER) == "pending" and store.partial(OTHER).load("training") is None


def test_a_workplace_alone_is_no_partial_work(store: Store) -> None:
    (store.workplace(KEY) / "half.npy").write_bytes(b"0")
    assert store.state(KEY) == "pending"


def test_a_commit_takes_the_partial_work_away(store: Store) -> None:
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"1"))
    store.partial(OTHER).save("training", lambda path: path.write_bytes(b"2"))
    commit(store)
    kept = {name.split("/")[1] for name in stored(store) if name.startswith("partial/")}
    assert kept == {OTHER}


def data_of(store: Store) -> str:
    """The name of the file that holds what was saved as `training`."""
    pointer = json.loads(stored(store)[f"partial/{KEY}/training.json"])
    return f"partial/{KEY}/{pointer['file']}"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("of", ["the data", "the pointer"])
def test_a_damaged_save_is_as_if_it_never_was(store: Store, of: str, damage: str) -> None:
    store.partial(KEY).save("training", lambda path: path.write_bytes(b"state"))
    name = data_of(store) if of == "the data" else f"partial/{KEY}/training.json"
    DAMAGE[damage](store, name)
    assert store.partial(KEY).load("training") is None and store.state(KEY) == "pending"


def test_only_the_last_save_is_kept(store: Store) -> None:
    overwrite(store, f"partial/{KEY}/training.0123456789ab", b"what a killed save left")
    for content in (b"1", b"2"):
        store.partial(KEY).save("training", partial(Path.write_bytes, data=content))
    assert stored(store).keys() == {data_of(store), f"partial/{KEY}/training.json"}


def test_a_pointer_moves_when_its_data_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    partial = store.partial(KEY)
    partial.save("training", lambda path: path.write_bytes(b"first"))
    monkeypatch.setattr(store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        partial.save("training", lambda path: path.write_bytes(b"second"))
    monkeypatch.undo()
    loaded = Store(store.url).partial(KEY).load("training")
    assert loaded is not None and loaded.read_bytes() == b"first"


# -- documents


def test_a_document_is_created_once(store: Store) -> None:
    assert store.create("leases/a/holder.json", "mine") and not store.create("leases/a/holder.json", "yours")
    assert store.read("leases/a/holder.json") == "mine"


def test_a_document_can_be_created_again_once_it_is_removed(store: Store) -> None:
    store.create("leases/a/holder.json", "mine")
    store.remove("leases/a/holder.json")
    assert store.read("leases/a/holder.json") is None and store.create("leases/a/holder.json", "yours")


def test_removing_what_is_not_there_is_fine(store: Store) -> None:
    store.remove("leases/a/holder.json")


def test_names_are_those_right_below_a_folder(store: Store) -> None:
    for name in ("leases/b/1.json", "leases/b/2.json", "leases/a/1.json"):
        store.create(name, name)
    assert (store.names("leases"), store.names("leases/b")) == (["a", "b"], ["1.json", "2.json"])
    assert store.names("nothing") == [] and store.names("leases/b/1.json/below") == []


# -- other processes


@pytest.mark.parametrize("what", [lambda s: s, lambda s: s.artifact(KEY).store, lambda s: s.partial(KEY).store])
def test_a_store_goes_to_another_process_by_its_place(store: Store, what: Callable[[Store], Store]) -> None:
    copy = what(pickle.loads(pickle.dumps(what(store))))
    assert (copy.url, copy.root, type(copy.fs)) == (store.url, store.root, type(store.fs))


def test_an_artifact_goes_to_another_process_by_its_key(store: Store) -> None:
    commit(store)
    artifact: Artifact = pickle.loads(pickle.dumps(store.artifact(KEY)))
    assert artifact.key == KEY and artifact.read("figures/loss.svg") == b"<svg/>"


def test_partial_work_goes_to_another_process_by_its_key(store: Store) -> None:
    partial = pickle.loads(pickle.dumps(store.partial(KEY)))
    partial.save("training", lambda path: path.write_bytes(b"1"))
    assert store.partial(KEY).load("training") is not None


def test_a_relative_store_is_the_same_folder_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = Store("relative")
    commit(store)
    monkeypatch.chdir(tmp_path / "elsewhere")
    code = (
        f"import pickle, sys; store = pickle.loads(bytes.fromhex(sys.argv[1])); print(store.state({KEY!r}), store.root)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(store).hex()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["cached", str(tmp_path / "relative")]


# -- runs and places


def test_a_run_record_is_read_back(store: Store) -> None:
    store.write_run("b-1", "{}")
    store.write_run("a-1", '{"x": 1}')
    assert store.runs() == ["a-1", "b-1"]
    assert store.read_run("a-1") == '{"x": 1}' and store.read_run("c-1") is None


def test_checking_that_a_store_can_be_written_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert stored(store) == {} and store.runs() == []


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        Store(str(tmp_path / "file" / "store")).check_writable()


def test_a_place_that_is_no_folder_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file" / "store"))
    assert store.state(KEY) == "pending" and store.runs() == [] and list(store.manifests()) == []


# -- formats


def test_canonical_json_has_one_form() -> None:
    assert canonical({"b": [1, 0.1, None], "a": {"é": True, "A": "x y"}}) == canonical(
        {"a": {"A": "x y", "é": True}, "b": [1, 1 / 10, None]}
    )


def test_canonical_json_is_pinned() -> None:
    document = {
        "stage": "distill",
        "version": 1,
        "params": {"lr": 0.0005, "site": {"block": 3}, "name": "é"},
        "on": None,
    }
    assert canonical(document) == (
        '{"on":null,"params":{"lr":0.0005,"name":"é","site":{"block":3}},"stage":"distill","version":1}'
    )


def test_canonical_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError):
        canonical({"lr": float("nan")})
