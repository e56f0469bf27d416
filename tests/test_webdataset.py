"""Images with captions in webdataset's tars: which belong together, what is refused, and how `features` leaves them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from graftwork.pipeline.execution import remote
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import data_fingerprint
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.data import CaptionsData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import load
from graftwork.stages.artifacts import latents
from graftwork.stages.data.caption_files import UnfitCaptions
from graftwork.stages.data.captions import Captions, read_captions
from graftwork.stages.data.hashes import ChangedImage
from graftwork.stages.data.sources import are_here, class_names, split
from tests.encoding import encode
from tests.scenes import PROMPTS, SHAPES_JOB, captioned, samples_of, write_shard

Members = Mapping[str, bytes | str]
BEFORE = "3c49380d674fae5891b045460c943a66ff1b9a6bcfcd2246ff6530cec7fb28eb"  # the key of eight images in a folder


def data_of(path: Path | str, **changed: object) -> CaptionsData:
    return CaptionsData.model_validate({"path": str(path), "image_size": 16, "heldout": 0.25, **changed})


def read(path: Path | str) -> Captions:
    return read_captions(data_of(path))


def refused(path: Path | str) -> str:
    with pytest.raises(UnfitCaptions) as caught:
        read(path)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(f"data.path: got {str(path)!r}, ") and "; accepted: " in line, line
    return line


def root(path: Path | str, **changed: object) -> str:
    return data_fingerprint(data_of(path, **changed), Contents())[0]["images"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two tars with twelve samples each."""
    members = list(samples_of(tmp_path / "pictures").items())
    for number in range(2):
        write_shard(tmp_path / "in" / f"0000{number}.tar", dict(members[24 * number : 24 * number + 24]))
    return tmp_path / "in"


# -- which tars, and which files of them


def test_a_tar_a_folder_of_tars_and_a_glob_are_read(shards: Path) -> None:
    (shards / "00000_stats.json").write_text("{}")
    in_folder = read(shards)
    assert in_folder.line() == "24 images with 8 different captions"
    assert in_folder.by_image["00000.tar/001.png"] == "a small green square"
    assert in_folder.left_out_line() == "data.path: left out, by suffix: 1 .json"
    assert read(shards / "*.tar").by_image == in_folder.by_image
    assert list(read(shards / "00001.tar").by_image) == [f"00001.tar/{number:03d}.png" for number in range(12, 24)]


def test_tars_have_one_key_however_they_are_named_and_wherever_they_lie(shards: Path) -> None:
    key = root(shards)
    assert root(shards / "0000[01].tar") == root(shards / "**" / "*.tar") == key
    assert root(shards / "00000.tar") == root(shards / "0000[0].tar") != key
    shards.rename(shards.parent / "moved")
    assert root(shards.parent / "moved" / "*.tar") == key


def test_a_folder_below_keeps_its_name(shards: Path) -> None:
    (shards / "below").mkdir()
    (shards / "00001.tar").rename(shards / "below" / "00001.tar")
    for path in (shards, shards / "**" / "*.tar"):
        assert "below/00001.tar/012.png" in read(path).by_image
    assert next(iter(read(shards / "b*" / "*.tar").by_image)) == "below/00001.tar/012.png"


def test_signs_of_a_glob_in_the_name_of_a_file_are_its_name(shards: Path) -> None:
    folder = shards.rename(shards.parent / "in[0]")
    (folder / "00000.tar").rename(folder / "a[0].tar")
    assert len(read(folder / "a[0].tar").by_image) == len(read(folder / "00001.tar").by_image) == 12
    assert len(read(folder).by_image) == 24


def test_images_in_the_folder_come_before_tars(tmp_path: Path) -> None:
    captioned(tmp_path, 4)
    key = root(tmp_path)
    write_shard(tmp_path / "a.tar", {"1.png": b"", "1.txt": "a"})
    found = read(tmp_path)
    assert len(found.by_image) == 4 and found.left_out_line() == "data.path: left out, by suffix: 1 .tar"
    assert root(tmp_path) == key


KEYS: dict[str, tuple[Members, dict[str, str]]] = {
    "a text": ({"1.jpg": b"", "1.txt": "\ufeffa\r\n cat"}, {"1.jpg": "a cat"}),
    "the caption of a json": ({"1.jpg": b"", "1.json": '{"caption": "a cat", "text": "no"}'}, {"1.jpg": "a cat"}),
    "the text of a json": ({"1.jpg": b"", "1.json": '{"caption": null, "text": "a cat"}'}, {"1.jpg": "a cat"}),
    "a text before a json": ({"1.json": '{"caption": "no"}', "1.jpg": b"", "1.txt": "a cat"}, {"1.jpg": "a cat"}),
    "a json of no use": ({"1.json": "[]", "1.txt": "a cat", "1.jpg": b""}, {"1.jpg": "a cat"}),
    "the key ends at the first dot": (
        {"d.x/1.jpg": b"", "d.x/1.mask.png": b"", "d.x/1.txt": "a", "d.x/1.old.txt": "b", "d.x/1.cls": "3"},
        {"d.x/1.jpg": "a"},
    ),
    "the folder is in the key": (
        {"a/1.jpg": b"", "b/1.jpg": b"", "b/1.txt": "of b", "a/1.txt": "of a"},
        {"a/1.jpg": "of a", "b/1.jpg": "of b"},
    ),
    "the folder where it was written": ({"./1.jpg": b"", "1.txt": "a"}, {"1.jpg": "a"}),
    "large letters": ({"1.JPG": b"", "1.TXT": "a"}, {"1.JPG": "a"}),
    "nothing hidden": ({"1.jpg": b"", "1.txt": "a", "._1.jpg": b"", ".d/2.txt": "b"}, {"1.jpg": "a"}),
}


@pytest.mark.parametrize("case", KEYS)
def test_files_of_one_key_belong_together(tmp_path: Path, case: str) -> None:
    members, expected = KEYS[case]
    found = read(write_shard(tmp_path / "a.tar", members))
    assert found.by_image == {f"a.tar/{name}": caption for name, caption in expected.items()}
    assert found.spans.keys() == found.by_image.keys()


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    members = dict(KEYS["the key ends at the first dot"][0]) | {"README": "", "d.x/1.json": "{}"}
    line = read(write_shard(tmp_path / "a.tar", members)).left_out_line()
    assert line is not None and line.endswith("1 without a suffix, 1 .cls, 1 .json, 1 .mask.png, 1 .old.txt")


def test_a_key_in_two_tars_is_two_samples(tmp_path: Path) -> None:
    for tar in ("a", "b"):
        write_shard(tmp_path / f"{tar}.tar", {"1.jpg": b"", "1.txt": f"of {tar}"})
    assert read(tmp_path).by_image == {"a.tar/1.jpg": "of a", "b.tar/1.jpg": "of b"}


def test_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    path = write_shard(tmp_path / "a.tar", {f"{name}.jpg": b"", f"{name}.txt": "a café"})
    assert read(path).by_image == {f"a.tar/{name}.jpg": "a café"} and len(root(path)) == 64


# -- what is refused


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"9.png": b""}, "with 1 of 5 images without a caption: 'a.tar/9.png'; accepted: a caption for each image"),
        ({"9.txt": "a"}, "with 1 captions without an image: 'a.tar/9.txt'; accepted: an image for each caption"),
        ({"9.json": '{"text": "a"}'}, "with 1 captions without an image: 'a.tar/9.json'"),
        ({"9.png": b"", "9.json": '{"key": 1}'}, "with 1 of 5 images without a caption: 'a.tar/9.png'"),
        ({"000.txt": " \n"}, "with 1 empty captions, of 'a.tar/000.png'"),
        ({"000.txt": b"a\n\xff"}, "whose a.tar/000.txt in line 2 is no UTF-8"),
        ({"000.txt": "a\0"}, "whose a.tar/000.txt is no text"),
        ({"000.txt": "a" * (2**20 + 1)}, "whose a.tar/000.txt is larger than 1,048,576 bytes"),
        ({"9.png": b"", "9.json": "[1]"}, "whose a.tar/9.json is no JSON object: '[1]'; accepted: a JSON object with"),
        ({"9.png": b"", "9.json": '{"caption": 3}'}, "whose a.tar/9.json has a caption that is no text, 3"),
        ({"9.png": b"", "9.json": '{"text": "\\ud800"}'}, "whose a.tar/9.json has a text that is no text, "),
        ({"9.png": b"", "9.json": '{"text": "a\\u0000"}'}, "whose a.tar/9.json has a text that is no text, "),
        ({"000.jpg": b""}, "with images of one key: 'a.tar/000.png', 'a.tar/000.jpg'; accepted: one of a key"),
        ({"000.TXT": "a"}, "with captions of one key: 'a.tar/000.txt', 'a.tar/000.TXT'"),
        ({"./000.png": b""}, "which holds '000.png' twice; accepted: each file once"),
    ],
)
def test_samples_that_do_not_fit_are_one_line(tmp_path: Path, changed: Members, said: str) -> None:
    path = write_shard(tmp_path / "a.tar", samples_of(tmp_path / "pictures", 4) | dict(changed))
    assert said in refused(path)


@pytest.mark.parametrize(
    "members, said",
    [
        (
            {"1.png": b"", "2.png": b""},
            "with 2 of 2 images without a caption: 'a.tar/1.png', 'a.tar/2.png'; accepted: a ",
        ),
        ({"1.txt": "a", "1.heic": b""}, "without images, but 1 .heic, 1 .txt; accepted: a folder of images with"),
        ({"1.v2.jpg": b"", "1.v2.txt": "a"}, "without images, but 1 .v2.jpg, 1 .v2.txt"),
        ({}, "without images; accepted: "),
    ],
)
def test_a_tar_without_samples_says_what_is_there(tmp_path: Path, members: Members, said: str) -> None:
    assert said in refused(write_shard(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:700], "ends before its file at byte 0 does"),
        (lambda content: content[:-10_240], "ends"),
        (gzip.compress, "is compressed (gzip)"),
        (lambda content: b"no tar" * 200, "is no tar"),
    ],
)
def test_a_tar_that_is_not_whole_is_named(shards: Path, spoil: Callable[[bytes], bytes], said: str) -> None:
    bad = shards / "00001.tar"
    bad.write_bytes(spoil(bad.read_bytes()))
    accepted = "; accepted: whole tars that are not compressed"
    assert f"got {str(bad)!r}, which {said}" in refused(bad) and refused(bad).endswith(accepted)
    for path in (shards, shards / "*.tar"):
        assert f", whose 00001.tar {said}" in refused(path)


@pytest.mark.parametrize("name", ["00001.tar.gz", "00001.tgz"])
def test_a_compressed_tar_is_refused_and_not_left_out(shards: Path, name: str) -> None:
    packed = shards / name
    packed.write_bytes(gzip.compress((shards / "00001.tar").read_bytes()))
    (shards / "00001.tar").unlink()
    assert f"whose {name} is compressed (gzip)" in refused(shards)
    assert "which is compressed (gzip)" in refused(packed)


def test_a_tar_that_may_not_be_read_is_one_line(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("graftwork.stages.data.webdataset.index", denied)
    assert "whose 00000.tar cannot be read (Permission denied)" in refused(shards)


# -- the data of a job


def job_of(path: Path, folder: Path) -> JobSpec:
    """Return a job that reads images with captions there."""
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    places = {"DATA": path, "ENCODER": folder, "PROMPTS": folder / "prompts.jsonl"}
    text = SHAPES_JOB
    for name, place in places.items():
        text = text.replace(name, str(place))
    (folder / "job.yaml").write_text(text)
    return load(folder / "job.yaml")


@pytest.mark.parametrize("name", ["none.tar", "none", "*.tar.zst", "none/**/*.tar"])
def test_data_that_are_not_here_are_one_line_before_anything_runs(shards: Path, tmp_path: Path, name: str) -> None:
    job = job_of(shards / name, tmp_path)
    (line,) = preflight.absent(job)
    assert line.startswith(f"data.path: got '{shards / name}', no such folder or tar; accepted: a folder of images")
    assert not are_here(job.data) and data_fingerprint(job.data, Contents())[0] == {"images": "absent"}


def test_tars_that_are_not_whole_are_one_line_before_anything_runs(shards: Path, tmp_path: Path) -> None:
    job = job_of(shards / "*.tar", tmp_path)
    assert preflight.absent(job) == [] and "data.path" not in " ".join(preflight.shortages(job))
    os.truncate(shards / "00001.tar", 700)
    (line,) = [line for line in preflight.shortages(job) if line.startswith("data.path")]
    assert "whose 00001.tar ends before its file at byte 0 does" in line


def test_tars_of_this_machine_are_named_when_a_job_is_sent_elsewhere(shards: Path, tmp_path: Path) -> None:
    job = job_of(shards / "*.tar", tmp_path)
    assert f"data.path: '{shards}/*.tar' is a path of this machine" in remote.needed_there(job)[0]


def test_another_caption_or_image_in_a_tar_is_another_key(shards: Path, tmp_path: Path) -> None:
    key, by_times = root(shards), root(shards, trust="times")
    members = samples_of(tmp_path / "pictures")
    some = dict(list(members.items())[:24])
    write_shard(shards / "00000.tar", some)
    assert root(shards) == key
    write_shard(shards / "00000.tar", {**some, "000.txt": "a small green square"})
    assert root(shards) != key and root(shards, trust="times") != by_times
    write_shard(shards / "00000.tar", {**some, "000.png": members["001.png"]})
    assert root(shards) != key


def test_features_say_of_each_latent_of_a_tar_which_caption_it_has(shards: Path, tmp_path: Path, store: Store) -> None:
    out = encode(data_of(shards / "*.tar"), tmp_path / "out")
    meta, training = latents.read_meta(out), latents.read(out, "training")
    assert meta.classes == class_names(data_of(shards)) and meta.shape == (3, 16, 16)
    for x, label in zip(training.tensor(), training.labels.tolist(), strict=True):
        colour = x[:, 8, 8] > 0
        expected = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "yellow": [1, 1, 0]}
        assert colour.int().tolist() == expected[meta.classes[label].split()[2]]
    assert "  00000.tar/000.png" in (out / "images.sha256").read_text()


def test_a_broken_image_in_a_tar_is_named_by_its_place(shards: Path, tmp_path: Path, store: Store) -> None:
    members = samples_of(tmp_path / "pictures", 12)
    write_shard(shards / "00000.tar", members | {"003.png": b"no image"})
    with pytest.raises(ValueError, match=f"1 of 24 images are broken: {shards}/00000.tar/003.png: cannot be read"):
        encode(data_of(shards / "*.tar"), tmp_path / "out")


def test_a_broken_image_in_a_tar_is_left_out_if_the_spec_says_so(shards: Path, tmp_path: Path, store: Store) -> None:
    members = samples_of(tmp_path / "pictures", 12)
    write_shard(shards / "00000.tar", members | {"003.png": b"no image"})
    out = encode(data_of(shards, skip_broken=True), tmp_path / "out")
    assert json.loads((out / "broken.json").read_text())["broken"] == ["00000.tar/003.png"]


def test_an_image_that_another_takes_the_place_of_is_found(shards: Path, tmp_path: Path, store: Store) -> None:
    data = data_of(shards)
    hashes = Contents().images(data)
    members = samples_of(tmp_path / "pictures", 12)
    write_shard(shards / "00000.tar", {**members, "000.png": members["001.png"]})
    with pytest.raises(ChangedImage, match=r"00000.tar/000.png holds something else than when the job began"):
        encode(data, tmp_path / "out", images=hashes)


def test_what_was_read_of_a_tar_is_not_read_again(shards: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for tar in shards.iterdir():
        os.utime(tar, (1, 1))
    monkeypatch.setattr("graftwork.pipeline.planning.contents.is_racy", lambda *args: False)
    first = Contents(store)
    hashes = first.images(data_of(shards))
    first.keep()
    monkeypatch.setattr("graftwork.pipeline.planning.contents._hashed", None)  # reading would fail
    again = Contents(store).images(data_of(shards))
    moved = Contents(store).images(data_of(shards.rename(shards.parent / "moved")))
    assert hashes is not None and again is not None and moved is not None
    assert again.root == moved.root == hashes.root


def test_the_split_of_tars_is_of_all_images(shards: Path) -> None:
    training, heldout = split(data_of(shards))
    assert (len(training), len(heldout)) == (18, 6)
    assert all(item.span is not None and item.span.read()[:4] == b"\x89PNG" for item in (*training, *heldout))


def test_the_key_of_a_folder_is_what_it_was(tmp_path: Path) -> None:
    """Written down before tars were read: of a table, and of a text beside each image."""
    pixels = b"any bytes serve: none is decoded for a key"
    for folder in ("table", "texts"):
        (tmp_path / folder).mkdir()
        for number in range(8):
            (tmp_path / folder / f"{number}.png").write_bytes(pixels + bytes([number]))
            if folder == "texts":
                (tmp_path / folder / f"{number}.txt").write_text(f"caption {number % 3}")
    rows = [json.dumps({"file_name": f"{number}.png", "text": f"caption {number % 3}"}) for number in range(8)]
    (tmp_path / "table" / "metadata.jsonl").write_text("\n".join(rows))
    assert root(tmp_path / "table") == root(tmp_path / "texts") == BEFORE
