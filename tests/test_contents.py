"""What the files of a job hold decides its keys; each is read once, and what was read is remembered safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graftwork.pipeline.cli.app import app
from graftwork.pipeline.planning import contents
from graftwork.pipeline.planning.contents import NOTHING, Contents, Snapshot, is_racy
from graftwork.pipeline.planning.plan import Plan, differences, make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, load
from graftwork.stages.data.hashes import (
    IMAGES,
    ChangedImage,
    ImageHashes,
    read_hashes,
    require_content,
    write_hashes,
)
from tests.conftest import TINY

FEW = ["distill.samples=2", "distill.heldout=1"]
LONG_AGO = (10**9, 10**9)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the files that a test made be as old as those that a user has, but for the tests of just that."""
    monkeypatch.setattr(contents, "is_racy", lambda *_: False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten files, of ten bytes each."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(f"{name} image {number}"[:10].encode())
    return tmp_path / "photos"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read, by name."""
    counted: Counter[str] = Counter()
    original = contents._hashed

    def hashed(path: str) -> tuple[bytes, bytes]:
        counted["/".join(Path(path).parts[-2:])] += 1
        return original(path)

    monkeypatch.setattr(contents, "_hashed", hashed)
    return counted


def job(home: Path, *overrides: str, data: str = "") -> JobSpec:
    return load(TINY, [f"data={{kind: image_folder, path: '{home}', image_size: 16{data}}}", *FEW, *overrides])


def keys(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def planned(home: Path, store: Store | None = None, data: str = "") -> dict[str, str]:
    return keys(make_plan(job(home, data=data), Contents(store)))


def remembered(store: Store) -> Store:
    """A store that there is: what is read for a plan is kept in it."""
    Path(store.root).mkdir()
    return store


# -- content decides


def test_another_picture_under_the_same_name_size_and_time_is_another_key(photos: Path, store: Store) -> None:
    remembered(store)
    before = planned(photos, store)
    file = photos / "cat" / "3.png"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=times)
    after = planned(photos, store)
    assert all(after[name] != key for name, key in before.items())


@pytest.mark.parametrize("how", ["copied", "moved", "touched", "linked"])
def test_the_same_contents_are_the_same_keys(photos: Path, store: Store, how: str) -> None:
    remembered(store)
    before, other = planned(photos, store), photos.parent / "other"
    match how:
        case "copied":
            shutil.copytree(photos, other, copy_function=shutil.copyfile)
        case "moved":
            photos.rename(other)
        case "touched":
            for file in photos.rglob("*.png"):
                os.utime(file, LONG_AGO)
            other = photos
        case "linked":
            other.symlink_to(photos)
    assert planned(other, store) == before


def test_images_that_the_job_does_not_read_are_in_no_key(photos: Path, store: Store, reads: Counter[str]) -> None:
    before = planned(photos, data=", per_class: 3, heldout: 0.1")
    assert len(reads) == 8  # three of each class to train on, and one held out
    other = next(file for file in photos.rglob("*.png") if "/".join(file.parts[-2:]) not in reads)
    other.write_bytes(b"another")
    assert planned(photos, data=", per_class: 3, heldout: 0.1") == before


def test_where_broken_images_are_left_out_all_images_are_in_the_key(photos: Path) -> None:
    settings = ", per_class: 3, heldout: 0.1, skip_broken: true"
    before = planned(photos, data=settings)
    for file in photos.rglob("*.png"):
        content = file.read_bytes()
        file.write_bytes(b"another")
        assert planned(photos, data=settings)["features"] != before["features"], file
        file.write_bytes(content)


def test_another_order_of_the_classes_is_another_key(photos: Path) -> None:
    (photos.parent / "order.txt").write_text("dog\ncat\n")
    ordered = planned(photos, data=f", classes: {photos.parent}/order.txt")
    assert ordered["features"] != planned(photos)["features"]


def test_times_may_be_trusted_if_the_spec_says_so(photos: Path, reads: Counter[str]) -> None:
    before = planned(photos, data=", trust: times")
    file = photos / "cat" / "3.png"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=times)
    assert planned(photos, data=", trust: times") == before
    os.utime(file, LONG_AGO)
    assert planned(photos, data=", trust: times")["features"] != before["features"]
    assert not reads


# -- read once


def test_a_second_plan_reads_nothing(photos: Path, store: Store, reads: Counter[str]) -> None:
    remembered(store)
    planned(photos, store)
    assert len(reads) == 20 and set(reads.values()) == {1}
    reads.clear()
    planned(photos, store)
    assert not reads


def test_of_a_changed_folder_only_what_changed_is_read(photos: Path, store: Store, reads: Counter[str]) -> None:
    remembered(store)
    planned(photos, store)
    reads.clear()
    (photos / "cat" / "3.png").write_bytes(b"another")
    (photos / "dog" / "new.png").write_bytes(b"new")
    (photos / "dog" / "4.png").unlink()
    planned(photos, store)
    assert reads == {"cat/3.png": 1, "dog/new.png": 1}


def test_other_settings_read_what_was_not_read_and_no_more(photos: Path, store: Store, reads: Counter[str]) -> None:
    remembered(store)
    planned(photos, store, ", per_class: 3")
    planned(photos, store)
    assert set(reads.values()) == {1} and len(reads) == 20


def test_a_moved_folder_is_not_read_again(photos: Path, store: Store, reads: Counter[str]) -> None:
    remembered(store)
    planned(photos, store)
    reads.clear()
    photos.rename(photos.parent / "other")
    known = Contents(store)
    make_plan(job(photos.parent / "other"), known)
    assert not reads
    assert known.notes == [f"data.path: moved or copied from {photos}, same contents"]


@pytest.mark.parametrize("kind", ["weights={{kind: checkpoint, path: {}}}", "graft.0.scions={}"])
def test_a_checkpoint_is_read_once(tmp_path: Path, store: Store, reads: Counter[str], kind: str) -> None:
    remembered(store)
    (tmp_path / "base.pt").write_bytes(b"weights")
    asked = load(TINY, [kind.format(tmp_path / "base.pt")])
    first = keys(make_plan(asked, Contents(store)))
    assert keys(make_plan(asked, Contents(store))) == first
    assert sum(reads.values()) == 1
    (tmp_path / "base.pt").write_bytes(b"others.")
    assert keys(make_plan(asked, Contents(store))) != first


def test_a_folder_of_weights_is_read_once_and_the_key_is_that_of_its_files(
    tmp_path: Path, store: Store, reads: Counter[str]
) -> None:
    remembered(store)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    asked = load(TINY, [f"weights={{kind: checkpoint, path: {tmp_path}/model}}"])
    first = keys(make_plan(asked, Contents(store)))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    copied = load(TINY, [f"weights={{kind: checkpoint, path: {tmp_path}/copy}}"])
    assert keys(make_plan(copied, Contents(store))) == keys(make_plan(asked, Contents(store))) == first
    assert set(reads.values()) == {1} and len(reads) == 4


def test_a_file_of_a_checkpoint_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.pt").write_bytes(b"weights")
    monkeypatch.setattr(contents, "_hashed", lambda path: (contents.MISSING, NOTHING))
    with pytest.raises(SpecError, match=r"^weights.path: got /.*/base.pt, which cannot be read; accepted: "):
        make_plan(load(TINY, [f"weights={{kind: checkpoint, path: {tmp_path / 'base.pt'}}}"]))


def test_the_digits_remember_nothing(store: Store, reads: Counter[str]) -> None:
    remembered(store)
    make_plan(load(TINY), Contents(store))
    assert not reads and not store.names("contents")


# -- a memory that can be relied on


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "nonsense", "of another version"])
def test_a_damaged_memory_costs_reading_and_nothing_else(
    photos: Path, store: Store, reads: Counter[str], damage: str
) -> None:
    remembered(store)
    before = planned(photos, store)
    (name,) = store.names("contents")
    file = Path(store.root) / "contents" / name
    content = file.read_bytes()
    match damage:
        case "torn":
            file.write_bytes(content[: len(content) // 2])
        case "empty":
            file.write_bytes(b"")
        case "flipped":
            file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        case "nonsense":
            file.write_bytes(b"\n" * 50)
        case "of another version":
            body = content[:-32].replace(b'"version": 1', b'"version": 9')
            file.write_bytes(body + hashlib.sha256(body).digest())
    reads.clear()
    assert planned(photos, store) == before
    assert len(reads) == 20


def test_a_memory_is_what_was_put_into_it() -> None:
    whole = Snapshot("/x\0{}", "c", ("cat/\udcff.png", "dog/猫.png"), b"s" * 64, b"d" * 64)
    assert Snapshot.decode(whole.encode()) == whole
    none = Snapshot("/x", "c", (), b"", b"")
    assert Snapshot.decode(none.encode()) == none


def test_two_processes_at_once_read_the_same_and_leave_a_whole_memory(photos: Path, store: Store) -> None:
    remembered(store)
    found: list[dict[str, str]] = []
    together = [threading.Thread(target=lambda: found.append(planned(photos, store))) for _ in range(8)]
    for one in together:
        one.start()
    for one in together:
        one.join()
    assert len(found) == 8 and all(one == found[0] for one in found)
    (name,) = store.names("contents")
    assert len(Snapshot.decode(store.files.read(f"contents/{name}")).names) == 20


def test_a_store_that_may_not_be_written_costs_reading_and_nothing_else(
    photos: Path, store: Store, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    remembered(store)
    (Path(store.root) / "contents").touch()  # no folder: for root, no place is closed
    assert planned(photos, store) == planned(photos)
    assert set(reads.values()) == {2}


def test_a_remote_store_remembers_too(photos: Path, s3: Store, reads: Counter[str]) -> None:
    before = planned(photos, s3)
    assert planned(photos, s3) == before and set(reads.values()) == {1}


def test_an_image_that_is_gone_is_another_key_and_no_error(photos: Path, store: Store) -> None:
    remembered(store)
    (photos / "cat" / "link.png").symlink_to(photos / "dog" / "1.png")
    os.mkfifo(photos / "cat" / "pipe.png")
    before = planned(photos, store)
    (photos / "cat" / "link.png").unlink()
    (photos / "cat" / "link.png").symlink_to(photos / "nowhere.png")
    assert planned(photos, store)["features"] != before["features"]


def test_a_file_that_is_written_while_it_is_read_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(contents, "_packed", lambda *_: contents.STAT.pack(10, 0, 0, next(ticks)))
    with pytest.raises(SpecError, match=r"^data.path: got .*\.png, which is being written; accepted: "):
        make_plan(job(photos))


class Times:
    """A file's times, in ns."""

    def __init__(self, mtime: float, ctime: float) -> None:
        self.st_mtime_ns, self.st_ctime_ns = int(mtime * 1e9), int(ctime * 1e9)


@pytest.mark.parametrize(
    ("times", "racy"),
    [
        (Times(10, 10), False),
        (Times(99, 99), True),
        (Times(10, 99), True),  # its times were set
        (Times(99, 10), True),
        (Times(100.5, 100.5), True),  # written while it was read
        (Times(10, 500), True),  # of a clock that was set back since
        (Times(500, 10), False),  # its time was set
    ],
)
def test_a_file_younger_than_its_file_system_can_tell_is_not_trusted(times: Times, racy: bool) -> None:
    assert is_racy(times, 100 * 10**9, 101 * 10**9) is racy  # type: ignore[arg-type]


def test_a_young_file_is_read_again_until_it_is_old(
    photos: Path, store: Store, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    remembered(store)
    monkeypatch.setattr(contents, "is_racy", is_racy)
    planned(photos, store)
    planned(photos, store)
    assert set(reads.values()) == {2}
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)
    planned(photos, store)
    planned(photos, store)
    assert set(reads.values()) == {3}


# -- what a plan says


def graft_plan(home: Path, *overrides: str, options: tuple[str, ...] = ()) -> Result:
    given = [f"data={{kind: image_folder, path: '{home}', image_size: 16}}", *FEW, *overrides]
    return CliRunner().invoke(app, ["plan", str(TINY), *options, *(part for one in given for part in ("--set", one))])


def test_a_plan_of_a_folder_that_was_never_read_says_so_and_how_much_there_is(
    photos: Path, reads: Counter[str]
) -> None:
    done = graft_plan(photos)
    assert done.exit_code == 0
    assert "graft: the keys above are provisional until these are read, once" in done.stderr
    assert f"graft: data.path: 20 files in {photos}, 200 bytes\n" in done.stderr
    assert not reads and not (photos.parent / ".graftwork").exists()


def test_a_plan_reads_and_remembers_if_it_is_told_to(photos: Path, reads: Counter[str]) -> None:
    first = graft_plan(photos, options=("--read",))
    assert "provisional" not in first.stderr and len(reads) == 20
    second = graft_plan(photos)
    assert second.stdout == first.stdout and "provisional" not in second.stderr and len(reads) == 20
    assert first.stdout.split()[1] == planned(photos)["features"][:12]


def test_a_plan_reads_by_itself_what_changed_and_says_what_it_was(photos: Path) -> None:
    graft_plan(photos, options=("--read",))
    for number in range(4):
        (photos / "cat" / f"{number}.png").write_bytes(b"another")
    assert "graft: data.path: 4 files with other contents\n" in graft_plan(photos).stderr
    os.utime(photos / "cat" / "0.png", LONG_AGO)
    assert "graft: data.path: 1 file touched, with the same contents\n" in graft_plan(photos).stderr
    shutil.copytree(photos, photos.parent / "copy")
    said = graft_plan(photos.parent / "copy").stderr
    assert f"graft: data.path: moved or copied from {photos}, same contents\n" in said


def test_a_plan_leaves_what_is_too_much_to_a_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    graft_plan(photos, options=("--read",))
    reads.clear()
    monkeypatch.setattr(contents, "QUICK_BYTES", 9)
    (photos / "cat" / "0.png").write_bytes(b"0123456789")
    done = graft_plan(photos)
    assert f"graft: data.path: 1 file in {photos}, 10 bytes\n" in done.stderr and not reads


def test_a_plan_counts_the_images_that_differ_and_shows_no_hashes(photos: Path, store: Store) -> None:
    remembered(store)
    commit_features(store, make_plan(job(photos)))
    for number in range(4):
        (photos / "cat" / f"{number}.png").write_bytes(b"another")
    (photos / "dog" / "new.png").write_bytes(b"new")
    made = make_plan(job(photos))
    found = differences(made, made.states(store), store.manifests(), store)
    assert found["features"] == "4 images with other contents, 1 image more"


def test_the_same_images_in_renamed_classes_are_said_to_have_other_names(photos: Path, store: Store) -> None:
    remembered(store)
    commit_features(store, make_plan(job(photos)))
    for name in ("cat", "dog"):
        (photos / name).rename(photos / f"a-{name}")
    made = make_plan(job(photos))
    assert differences(made, made.states(store), store.manifests(), store)["features"] == "20 images under other names"


def test_a_plan_compares_with_nothing_beside_a_store_of_other_images(photos: Path, store: Store) -> None:
    remembered(store)
    commit_features(store, make_plan(job(photos)))
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        file.with_name(f"other-{number}.png").write_bytes(f"other {number}".encode())
        file.unlink()
    made = make_plan(job(photos))
    assert differences(made, made.states(store), store.manifests(), store) == {}


def commit_features(store: Store, plan: Plan) -> None:
    """Leave the artifact of `features` as far as a plan looks at it."""
    step = plan["features"]
    folder = store.workplace(step.key)
    assert step.images is not None
    write_hashes(folder / IMAGES, step.images.by_name)
    store.commit(step.key, folder, dict(step.identity), Origin(step="features", run="r", seconds=1, made="now"))


# -- what is read is what was hashed


def test_the_list_of_hashes_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    names = ["a.png", "b c.png", "new\nline.png", "back\\slash.png", "\udcff.png", "猫.png"]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    write_hashes(tmp_path / IMAGES, {name: hashlib.sha256(os.fsencode(name)).digest() for name in names})
    done = subprocess.run(["sha256sum", "-c", IMAGES], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_hashes((tmp_path / IMAGES).read_bytes())) == len(names)


def test_an_image_that_was_replaced_since_it_was_hashed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"image")
    digest = hashlib.sha256(b"image").hexdigest()
    require_content(tmp_path, "cat/0.png", digest)
    (tmp_path / "cat" / "0.png").write_bytes(b"other")
    with pytest.raises(ChangedImage, match=r"^data.path: cat/0.png holds something else than when the job began; acc"):
        require_content(tmp_path, "cat/0.png", digest)


def test_images_that_came_or_went_and_classes_in_another_order_are_one_line() -> None:
    hashes = ImageHashes(("cat", "dog"), 1, ("cat/0.png", "dog/0.png"), b"x" * 64)
    hashes.require_same(("cat", "dog"), ["cat/0.png", "dog/0.png"])
    with pytest.raises(ChangedImage, match=r"came or went since the job began \(dog/1.png\); accepted: "):
        hashes.require_same(("cat", "dog"), ["cat/0.png", "dog/1.png", "dog/0.png"])
    with pytest.raises(ChangedImage, match="other class folders than when the job began; accepted: "):
        hashes.require_same(("dog", "cat"), ["cat/0.png", "dog/0.png"])


def test_planning_images_loads_neither_the_heavy_libraries_nor_pillow_or_numpy(photos: Path) -> None:
    overrides = [f"data={{kind: image_folder, path: '{photos}', image_size: 16}}", *FEW]
    heavy = "{'torch', 'ray', 'mlflow', 'PIL', 'numpy', 'sklearn'}"
    asked = f"graftwork.plan({str(TINY)!r}, {overrides!r}, read=True)"
    code = f"import sys, graftwork; {asked}; assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
