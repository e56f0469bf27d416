"""Features: which images are encoded, in shards that survive a kill, and how the shards are read; memory stays flat."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import PixelCodec
from graftwork.specs.data import ImageFolderData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import job_from, load
from graftwork.specs.resources import StepResources
from graftwork.stages.artifacts.latents import Latents, Shards, ShardWriter, read, read_meta, require_enough
from graftwork.stages.catalog.features import FeaturesParams
from graftwork.stages.contract import Context, Stopped
from graftwork.stages.data import listing
from graftwork.stages.data.hashes import ChangedImage, ImageHashes
from graftwork.stages.data.listing import ClassFolder, Listing
from graftwork.stages.data.sources import Item, interleave, split, split_sizes
from graftwork.stages.features import features
from graftwork.stages.training.batches import TrainingSet, draw_batch
from tests.conftest import ROOT
from tests.tiny_training import RECIPE, Killed, assert_same_bits, make_data, run_until_done, state_of, tensors_of

CPU = torch.device("cpu")
MIB = 2**20


# -- reading shards


@pytest.fixture
def whole() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((23, 2, 4, 4), dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path, whole: NDArray[np.float32]) -> Path:
    """A split in shards of 10, 10 and 3."""
    for number, start in enumerate(range(0, 23, 10)):
        np.save(tmp_path / f"training_latents-{number:05d}.npy", whole[start : start + 10])
    np.save(tmp_path / "training_labels.npy", np.arange(23) % 3)
    return tmp_path


@pytest.mark.parametrize("chosen", [[0], [22, 0, 10, 9, 9], list(range(23)), [], list(range(22, -1, -2))], ids=str)
def test_shards_are_indexed_as_the_tensor_that_they_make_up(
    folder: Path, whole: NDArray[np.float32], chosen: list[int]
) -> None:
    found, indices = read(folder, "training").x, torch.tensor(chosen, dtype=torch.long)
    assert found.shape == whole.shape
    assert torch.equal(found[indices], torch.from_numpy(whole)[indices])


@pytest.mark.parametrize("run", [slice(0, 5), slice(None, 10), slice(10), slice(7, 21), slice(20, 99), slice(0, 0)])
def test_a_run_of_shards_is_that_of_the_tensor(folder: Path, whole: NDArray[np.float32], run: slice) -> None:
    found = read(folder, "training").x
    assert isinstance(found, Shards)
    assert np.array_equal(found[run].tensor().numpy(), whole[run])
    (index,) = found[run][torch.arange(len(whole[run]))[-1:]] if len(whole[run]) else (None,)
    assert index is None or np.array_equal(index.numpy(), whole[run][-1])


def test_shards_are_split_as_the_tensor_is(folder: Path, whole: NDArray[np.float32]) -> None:
    for found, part in zip(read(folder, "training").x.split(8), torch.from_numpy(whole).split(8), strict=True):
        assert torch.equal(found, part)


def test_an_index_beyond_the_last_latent_is_an_error(folder: Path) -> None:
    for index in (23, -1):
        with pytest.raises(IndexError):
            read(folder, "training").x[torch.tensor([index])]


def resident(work: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grew for what the work gives, and what that holds on to."""
    before = psutil.Process().memory_info().rss
    kept = work()
    grown = psutil.Process().memory_info().rss - before
    del kept
    return grown


def test_a_batch_of_a_split_of_2_gib_costs_no_more_than_the_batch(tmp_path: Path) -> None:
    for number in range(8):
        ShardWriter(tmp_path / f"training_latents-{number:05d}.npy", (2**14, 4, 32, 32))  # with holes for most of it
    np.save(tmp_path / "training_labels.npy", np.zeros(2**17, dtype=np.int64))
    chosen = torch.arange(0, 2**17, 2**17 // 64)

    def work() -> tuple[Latents, torch.Tensor]:
        latents = read(tmp_path, "training").share(0.9)
        return latents, latents.x[chosen[:50]]

    assert resident(work) < 64 * MIB


# -- writing shards


def test_a_shard_is_filled_in_any_order(tmp_path: Path, whole: NDArray[np.float32]) -> None:
    writer = ShardWriter(tmp_path / "heldout_latents-00000.npy", whole.shape)
    for start in (16, 0, 8):
        writer.write(start, whole[start : start + 8])
    assert np.array_equal(np.load(writer.path), whole)


def test_a_writers_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    writer, piece = ShardWriter(tmp_path / "training_latents-00000.npy", (2**14, 4, 32, 32)), np.zeros((64, 4, 32, 32))
    pieces = [(start, piece.astype(np.float32)) for start in range(0, 2**14, 64 * 4)]

    def write() -> None:
        for start, one in pieces:
            for part in range(4):
                writer.write(start + 64 * part, one)

    grown = resident(write)
    assert writer.path.stat().st_size > 256 * MIB and grown < 32 * MIB


# -- either view


@pytest.fixture
def both() -> TrainingSet:
    """Latents, and as their mirror images the same below zero."""
    data = make_data()
    positive = data.latents[torch.arange(30)].abs() + 0.1
    return replace(data, latents=positive, mirrored=-positive)


def test_training_sees_an_image_or_its_mirror_image_one_as_often_as_the_other(both: TrainingSet) -> None:
    plain = replace(both, mirrored=None)
    mirrored = []
    for step in range(100):
        found, without = (draw_batch(data, RECIPE, 0, "base", step, 0, 1) for data in (both, plain))
        signs = found[0].sign().amax((1, 2, 3))
        assert torch.equal(found[0], without[0] * signs[:, None, None, None])
        others = zip(tensors_of(found)[1:], tensors_of(without)[1:], strict=True)
        assert all(torch.equal(a, b) for a, b in others)  # all else is drawn the same
        mirrored.append(signs < 0)
    assert 0.4 < torch.cat(mirrored).float().mean() < 0.6
    assert len({tuple(one.tolist()) for one in mirrored}) > 50  # another draw each step


@pytest.mark.parametrize("workers", [2, 4])
def test_the_workers_see_the_same_views_as_one_would(both: TrainingSet, workers: int) -> None:
    one = draw_batch(both, RECIPE, 0, "base", 3, 0, 1)
    parts = [draw_batch(both, RECIPE, 0, "base", 3, rank, workers) for rank in range(workers)]
    together = map(torch.cat, zip(*map(tensors_of, parts), strict=True))
    assert all(map(torch.equal, together, tensors_of(one)))


def test_training_on_both_views_that_was_killed_ends_in_the_same_bits(tmp_path: Path, both: TrainingSet) -> None:
    store = Store(str(tmp_path / "store"))
    run_until_done(store, "straight", both, ())
    run_until_done(store, "killed", both, (6, 9))
    assert_same_bits(state_of(store.partial("killed")), state_of(store.partial("straight")))


def test_a_prefix_keeps_its_mirror_images() -> None:
    latents = Latents(torch.arange(8.0), Condition(labels=torch.arange(8) % 2), -torch.arange(8.0)).share(0.5)
    assert isinstance(latents.mirrored, Tensor) and latents.mirrored.tolist() == [0, -1, -2, -3]


# -- which images


def listed(sizes: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every image folder hold so many images of each class."""
    folders = [ClassFolder(name, [f"{name}_{number}.JPEG" for number in range(size)]) for name, size in sizes.items()]
    monkeypatch.setattr(listing, "_list", lambda data: Listing(data.path, tuple(folders)))


def test_so_many_of_each_class_are_the_fraction_that_finetuning_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,290 of ImageNet's 1,300 images a class, of which 10 are held out; its 10% are 128 a class in 1,280."""
    listed({f"n{label:04d}": 1290 for label in range(20)}, monkeypatch)
    settings = {"path": "imagenet", "heldout": 0.0078}
    everything, heldout = split(ImageFolderData(**settings))
    kept, held = split(ImageFolderData(**settings, per_class=128))
    tenth = (
        Latents(torch.arange(len(everything)), Condition(labels=torch.arange(len(everything)) % 20)).share(0.1).tensor()
    )
    assert len(everything) == 20 * 1280 and len(kept) == 20 * 128
    assert kept == [everything[index] for index in tenth.tolist()]
    assert held == heldout


def test_of_classes_of_any_size_the_first_by_hash_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    listed({"cat": 40, "dog": 25, "elk": 13}, monkeypatch)
    everything, heldout = split(ImageFolderData(path="x", heldout=0.2))
    kept, held = split(ImageFolderData(path="x", heldout=0.2, per_class=10))
    first = [[item for item in everything if item.label == label][:10] for label in range(3)]
    assert kept == interleave(first) and held == heldout
    assert (len(kept), len(held)) == split_sizes(ImageFolderData(path="x", heldout=0.2, per_class=10)) == (30, 16)


def job(home: str, **changes: Any) -> JobSpec:
    return job_from(
        {
            "name": "photos",
            "data": {"kind": "image_folder", "path": home, "image_size": 16, "heldout": 0.25, **changes},
            "model": {"kind": "dit", "depth": 2, "width": 16, "heads": 2, "patch": 2},
            "graft": [{"target": "mha", "operator": {"kind": "swa"}, "layers": {"kind": "all"}}],
            "distill": {"samples": 9},
        }
    )


def test_more_of_each_class_than_the_smallest_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed({"cat": 40, "dog": 12}, monkeypatch)
    assert preflight.shortages(job(str(tmp_path), per_class=9)) == []
    (line,) = preflight.shortages(job(str(tmp_path), per_class=10))
    assert line == "data.per_class: got 10; accepted: at most 9, the training images of the class dog"


@pytest.mark.parametrize(
    ("sizes", "held", "total"), [({"cat": 12}, 1, 12), ({"cat": 1, "dog": 1}, 0, 2), ({"cat": 1, "dog": 12}, 1, 13)]
)
def test_fewer_than_two_held_out_images_are_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], held: int, total: int
) -> None:
    listed(sizes, monkeypatch)
    spec = job(str(tmp_path), heldout=0.1)
    lines = [line for line in preflight.shortages(spec) if line.startswith("data.heldout: ")]
    assert lines[0].startswith(f"data.heldout: got 0.1, which holds out {held} of {total} images, ")
    assert lines[0].partition("; ")[2].startswith("accepted: data of which at least 2 are held out")


def test_classes_of_which_no_image_is_held_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed({"cat": 40, "dog": 1, "owl": 1}, monkeypatch)
    spec = job(str(tmp_path))
    assert preflight.shortages(spec) == []
    assert preflight.notes(spec) == ["data.heldout: 2 of 3 classes have one image, and none held out: 'dog', 'owl'"]


def test_samples_to_distil_from_are_those_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed({"cat": 40, "dog": 12}, monkeypatch)
    (line,) = preflight.shortages(job(str(tmp_path), per_class=4))
    assert line.startswith("distill.samples: got 9; accepted: at most 8, ")


def test_the_published_grafts_read_128_of_each_class_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet's classes have 732 to 1,300 images."""
    spec = load(ROOT / "examples" / "imagenet" / "hyena_y-50.yaml")
    sizes = {f"n{label:04d}": 732 + 568 * (label % 100 > 10) for label in range(1000)}
    listed(sizes, monkeypatch)
    assert preflight._data_shortages(spec) == []
    training, heldout = split_sizes(spec.data)
    assert training == 128_000 == training * spec.finetune.fraction
    assert spec.distill.samples == 8000 <= heldout < 10_000


def test_fewer_held_out_images_than_were_asked_for_are_an_error_where_broken_ones_are_left_out() -> None:
    require_enough("distill.heldout", 9, 9, "held-out")
    with pytest.raises(ValueError, match=r"^distill.heldout: got 9; accepted: at most 8, the held-out images that can"):
        require_enough("distill.heldout", 9, 8, "held-out")


# -- the stage, on one worker


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, too, go through Ray Data."""
    monkeypatch.setattr(features, "WORTH_A_STREAM", 0)
    monkeypatch.setattr(features, "WORTH_A_SURVEY", 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 40 photographs; a quarter is held out: 60 and 20."""
    home, pixels = tmp_path / "photos", np.random.default_rng(0)
    for label in range(2):
        (home / f"class-{label}").mkdir(parents=True)
        for number in range(40):
            image = pixels.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(image).save(home / f"class-{label}" / f"{number}.png")
    return home


def data_of(photos: Path, **settings: Any) -> ImageFolderData:
    return ImageFolderData(path=str(photos), image_size=8, heldout=0.25, **settings)


def encode(
    store: Store,
    data: ImageFolderData,
    report: Callable[..., None] = lambda *_: None,
    stopping: Callable[[], bool] = lambda: False,
    images: ImageHashes | None = None,
) -> Path:
    """The step, as a task does it."""
    context = Context(
        step="features",
        params=FeaturesParams(data=data, codec=PixelCodec()),
        inputs={},
        out=store.workplace("features"),
        partial=store.partial("features"),
        report=report,
        resources=StepResources(),
        device=CPU,
        stopping=stopping,
        images=images,
    )
    features.run(context)
    return context.out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20: three to train on, with as many of mirror images, and one held out; pieces of 8."""
    monkeypatch.setattr(features, "SHARD", 20)
    monkeypatch.setattr(features, "BATCHES_A_TASK", 1)
    monkeypatch.setattr(features, "BATCH", 8)


@pytest.mark.usefixtures("warm_ray")
def test_the_artifact_tells_what_each_image_held_and_which_label_each_class_has(photos: Path, tmp_path: Path) -> None:
    for label in (2, 10):
        (photos / f"class-{label % 5 // 2}").rename(photos / str(label))
    data = data_of(photos)
    out = encode(Store(str(tmp_path / "store")), data, images=Contents().images(data))
    assert read_meta(out).classes == ("2", "10")
    chosen = [item.name for part in split(data) for item in part]
    told = [f"{hashlib.sha256((photos / name).read_bytes()).hexdigest()}  {name}" for name in chosen]
    assert (out / "images.sha256").read_text().splitlines() == told


@pytest.mark.usefixtures("warm_ray")
@pytest.mark.parametrize("change", ["replaced", "gone", "new"])
def test_an_image_that_changes_between_hashing_and_reading_is_found_and_nothing_of_it_is_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    small_shards(monkeypatch)
    store, data = Store(str(tmp_path / "store")), data_of(photos)
    images, file = Contents().images(data), photos / split(data)[0][30].name  # of the second shard
    match change:
        case "replaced":
            Image.new("RGB", (10, 8)).save(file)
        case "gone":
            file.unlink()
        case "new":
            shutil.copy(file, file.with_name("new.png"))
    with pytest.raises(ChangedImage, match=r"^data\.path: .* the job began.*; accepted: ") as caught:
        encode(store, data, images=images)
    assert (file.name if change != "new" else "new.png") in str(caught.value)
    kept = [name for name in store.names("partial/features") if name.endswith(".json")]
    if change == "replaced":  # seen when it is read; what was read before it is as it was
        assert "training_latents-00001.npy.json" not in kept
    else:
        assert kept == []


@pytest.mark.usefixtures("warm_ray")
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_shard_that_is_whole_is_not_encoded_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    small_shards(monkeypatch)
    data = data_of(photos, flip=True)
    straight = contents(encode(Store(str(tmp_path / "straight")), data))

    store = Store(str(tmp_path / "store"))

    def kept_now() -> int:
        """Shards whose files are all there."""
        return sum("." in name and name.endswith(".json") for name in store.names("partial/features")) // 2

    def report(done: int, total: int, metrics: object = None) -> None:
        if how == "killed" and kept_now() >= 2:
            raise Killed

    with pytest.raises(Killed if how == "killed" else Stopped):
        encode(store, data, report, stopping=lambda: how == "stopped" and kept_now() >= 2)
    there = {name for name in straight if store.partial("features").load(name) is not None}
    assert there
    training, heldout = split(data)
    done: list[Item] = []
    for shard in features.shards({"training": training, "heldout": heldout}, data.flip):
        if set(shard.files) <= there:
            done += shard.items
    assert 20 <= len(done) < 80
    for item in done:  # who reads it again finds no image
        (photos / item.name).write_bytes(b"<html>404: not found</html>")
    seen: list[tuple[int, int]] = []
    assert contents(encode(store, data, lambda done, total, metrics=None: seen.append((done, total)))) == straight
    assert seen[0] == (len(done), 80) and seen[-1] == (80, 80)

    step = store.workplace("features")
    assert list(step.iterdir()) == []  # a further attempt begins in an empty folder, with all of it kept
    for item in [*training, *heldout]:
        (photos / item.name).write_bytes(b"")
    assert contents(encode(store, data)) == straight


@pytest.mark.usefixtures("warm_ray")
def test_both_views_are_encoded_and_the_first_is_that_without_the_other(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    both = encode(Store(str(tmp_path / "both")), data_of(photos, flip=True))
    plain = contents(encode(Store(str(tmp_path / "plain")), data_of(photos)))
    assert {name: content for name, content in contents(both).items() if "mirrored" not in name} == plain
    training = read(both, "training")
    assert training.mirrored is not None and read(both, "heldout").mirrored is None
    every = torch.arange(60)
    assert torch.equal(training.mirrored[every], training.x[every].flip(-1))


@pytest.mark.usefixtures("warm_ray")
def test_few_images_are_read_in_the_step_itself_with_the_same_result(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    streamed = contents(encode(Store(str(tmp_path / "streamed")), data_of(photos, flip=True)))
    monkeypatch.setattr(features, "WORTH_A_STREAM", 80)
    monkeypatch.setattr(features, "_rows", None)  # Ray Data has no part in it
    assert contents(encode(Store(str(tmp_path / "here")), data_of(photos, flip=True))) == streamed
    monkeypatch.setattr(features, "WORTH_A_STREAM", 79)
    with pytest.raises(TypeError):
        encode(Store(str(tmp_path / "one more")), data_of(photos))


@pytest.mark.usefixtures("warm_ray")
def test_what_is_kept_becomes_the_artifact_without_a_copy(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    store = Store(str(tmp_path / "store"))
    out = encode(store, data_of(photos))
    name = "training_latents-00002.npy"
    kept = store.partial("features").load(name)
    assert kept is not None and kept.samefile(out / name)


@pytest.mark.usefixtures("warm_ray")
def test_only_the_images_that_are_kept_are_read(photos: Path, tmp_path: Path) -> None:
    data = data_of(photos, per_class=5)
    training, heldout = split(data)
    needed = {item.name for item in [*training, *heldout]}
    for path in photos.glob("*/*.png"):
        if f"{path.parent.name}/{path.name}" not in needed:
            path.write_bytes(b"")
    out = encode(Store(str(tmp_path / "store")), data)
    assert len(needed) == 30 and (read_meta(out).num_training, read_meta(out).num_heldout) == (10, 20)


@pytest.mark.usefixtures("warm_ray")
def test_the_next_of_its_class_takes_a_broken_images_place_until_there_is_none(photos: Path, tmp_path: Path) -> None:
    data = data_of(photos, per_class=5, skip_broken=True)
    broken = [item.name for item in split(data)[0] if item.label == 0][:2]
    for name in broken:
        (photos / name).write_bytes(b"")
    out = encode(Store(str(tmp_path / "store")), data)
    assert np.bincount(read(out, "training").labels.numpy()).tolist() == [5, 5]
    told = json.loads((out / "broken.json").read_text())
    assert told["broken"] == sorted(broken) and 30 < told["of"] < 40

    with pytest.raises(
        ValueError, match=r"^data.per_class: got 30; accepted: at most 2\d, .* class-0 that can be read$"
    ):
        encode(Store(str(tmp_path / "other")), data_of(photos, per_class=30, skip_broken=True))
