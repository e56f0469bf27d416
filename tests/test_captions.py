"""Images with captions: which image has which, what is refused, and how `features` leaves them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import data_fingerprint
from graftwork.specs.data import CaptionsData
from graftwork.stages.artifacts import latents
from graftwork.stages.data.caption_files import UnfitCaptions
from graftwork.stages.data.captions import Captions, read_captions
from graftwork.stages.data.sources import class_names, labels_line, num_classes, split, split_sizes
from tests.encoding import encode
from tests.scenes import captioned, write_pictures, write_table

Spoil = Callable[[Path], object]


def data_of(folder: Path, **changed: object) -> CaptionsData:
    return CaptionsData.model_validate({"path": str(folder), "image_size": 16, "heldout": 0.25, **changed})


def read(folder: Path) -> Captions:
    return read_captions(data_of(folder))


def refused(folder: Path) -> str:
    with pytest.raises(UnfitCaptions) as caught:
        read(folder)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"data.path: got {str(folder)!r}, ") and "; accepted: " in line, line
    return line


# -- where captions stand


def test_a_table_of_json_lines_names_images_and_texts(tmp_path: Path) -> None:
    captions = write_pictures(tmp_path / "in")
    (tmp_path / "in" / "more").mkdir()
    (tmp_path / "in" / "000.png").rename(tmp_path / "in" / "more" / "ünï.png")
    captions["./more//ünï.png"] = captions.pop("000.png")
    write_table(tmp_path / "in", captions)
    found = read(tmp_path / "in")
    assert found.by_image["more/ünï.png"] == "a small red square" and len(found.by_image) == 24
    assert found.line() == "24 images with 8 different captions" and found.left_out_line() is None


@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n")])
def test_a_table_of_commas_and_quotes(tmp_path: Path, start: str, end: str) -> None:
    captions = write_pictures(tmp_path, 4)
    rows = [f'{number},{name},"a ""big"", {caption}"' for number, (name, caption) in enumerate(captions.items())]
    (tmp_path / "metadata.csv").write_bytes((start + end.join(["id,file_name,text", *rows, ""])).encode())
    assert read(tmp_path).by_image["001.png"] == 'a "big", a small green square'


def test_a_text_beside_each_image(tmp_path: Path) -> None:
    for folder in ("", "below"):
        for name, caption in write_pictures(tmp_path / folder, 3).items():
            (tmp_path / folder / name).with_suffix(".txt").write_bytes(f"\ufeff{caption}\r\n  and more\n".encode())
    (tmp_path / "LICENCE").write_text("mine")
    (tmp_path / ".hidden.txt").write_text("not read")
    found = read(tmp_path)
    assert found.by_image["below/002.png"] == "a small blue square and more" and len(found.by_image) == 6
    assert found.left_out_line() == "data.path: left out, by suffix: 1 without a suffix"


def test_a_name_that_is_no_utf8_has_its_caption_beside_it(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(tmp_path / "000.png", raw + b".png")  # noqa: PTH104  # pathlib has no bytes
    Path(os.fsdecode(raw + b".txt")).write_text("a café")
    assert list(read(tmp_path).by_image.values()) == ["a café"]
    hashes = data_fingerprint(data_of(tmp_path), Contents())[1]
    assert hashes is not None and len(hashes.root) == 64


def test_a_circle_of_links_is_walked_once(tmp_path: Path) -> None:
    captioned(tmp_path / "in", 4)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert len(read(tmp_path / "in").by_image) == 4


# -- what is refused


def lines(*rows: str) -> Spoil:
    return lambda folder: (folder / "metadata.jsonl").write_text("\n".join(rows))


def row(**fields: object) -> str:
    return json.dumps({"file_name": "000.png", "text": "a"} | fields)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "000.png").unlink(), "1 captions of files which are not there: '000.png'"),
        (lambda folder: write_pictures(folder, 6), "2 of 6 images without a caption: '004.png', '005.png'"),
        (lambda folder: (folder / "metadata.csv").touch(), "with both metadata.jsonl and metadata.csv"),
        (lambda folder: (folder / "metadata.jsonl").unlink(), "4 of 4 images without a caption"),
        (lambda folder: (folder / "metadata.jsonl").write_bytes(b'{"a": "b"}\n"\xff"'), "in line 2 is no UTF-8"),
        (lambda folder: (folder / "metadata.jsonl").write_text("a\0b"), "whose metadata.jsonl is no text"),
        (lines(row(), "[1]"), "metadata.jsonl in line 2 is no JSON object: '[1]'"),
        (lines(row(), "", '{"file_name": '), "metadata.jsonl in line 3 is no JSON object"),
        (lines('{"image": "000.png", "text": "a"}'), "in line 1 has no file_name, but 'image', 'text'"),
        (lines(row(text=3)), "has a text that is no text, 3, but"),
        (lines(row(text="\ud800")), "has a text with half a character"),
        (lines(row(), row()), "names '000.png' in the lines 1 and 2; accepted: each image once"),
        (lines(row(), row(file_name="./000.png")), "names '000.png' in the lines 1 and 2"),
        (lines(row(file_name="/etc/passwd")), "'/etc/passwd', no path below the folder"),
        (lines(row(file_name="a/../../b.png")), "no path below the folder"),
        (lines(row(file_name="")), "no path below the folder"),
        (lines(*(row(file_name=f"00{n}.png", text=" \n") for n in range(4))), "4 empty captions, of '000.png'"),
        (lines(row(file_name="metadata.jsonl")), "captions of files which are no images by their suffix"),
    ],
)
def test_captions_that_do_not_fit_are_one_line(tmp_path: Path, spoil: Spoil, said: str) -> None:
    captioned(tmp_path / "in", 4)
    spoil(tmp_path / "in")
    assert said in refused(tmp_path / "in")


@pytest.mark.parametrize(
    "content, said",
    [("name,text\n000.png,a\n", "has no file_name, but 'name', 'text'"), ('file_name,text\n"a"b,c\n', "is no CSV")],
)
def test_a_damaged_csv_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text(content)
    assert said in refused(tmp_path)


def test_texts_and_images_of_other_names_are_one_line(tmp_path: Path) -> None:
    for name, caption in write_pictures(tmp_path, 2).items():
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "cat.txt").write_text("a cat")
    assert "1 captions without an image: 'cat.txt'" in refused(tmp_path)
    (tmp_path / "cat.txt").unlink()
    (tmp_path / "000.jpg").write_bytes((tmp_path / "000.png").read_bytes())
    assert "images of one name for one text: '000.jpg', '000.png'" in refused(tmp_path)


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    assert "without images, but 1 .txt; accepted: a folder of images with metadata.jsonl" in refused(tmp_path)


# -- the data of a job


def test_labels_are_numbers_of_captions_and_the_split_is_of_all_images(tmp_path: Path) -> None:
    data = data_of(captioned(tmp_path))
    assert num_classes(data) == 8 and class_names(data)[0] == "a large blue square"
    assert labels_line(data) == "24 images with 8 different captions"
    training, heldout = split(data)
    assert split_sizes(data) == (len(training), len(heldout)) == (18, 6)
    for item in (*training, *heldout):
        assert class_names(data)[item.label] == read_captions(data).by_image[item.name]


def test_another_caption_is_another_key_and_another_place_is_not(tmp_path: Path) -> None:
    def root(folder: Path, **changed: object) -> str:
        return data_fingerprint(data_of(folder, **changed), Contents())[0]["images"]

    captions = write_pictures(tmp_path / "in")
    write_table(tmp_path / "in", captions)
    first, by_times = root(tmp_path / "in"), root(tmp_path / "in", trust="times")
    (tmp_path / "in").rename(tmp_path / "moved")
    assert root(tmp_path / "moved") == first
    swapped = captions | {"000.png": captions["001.png"], "001.png": captions["000.png"]}  # the same texts and images
    write_table(tmp_path / "moved", swapped)
    assert root(tmp_path / "moved") != first and root(tmp_path / "moved", trust="times") != by_times


def test_features_say_of_each_latent_which_caption_it_has(tmp_path: Path) -> None:
    data = data_of(captioned(tmp_path / "in"))
    out = encode(data, tmp_path / "out")
    meta, training = latents.read_meta(out), latents.read(out, "training")
    assert meta.classes == class_names(data) and meta.shape == (3, 16, 16)
    for x, label in zip(training.tensor(), training.labels.tolist(), strict=True):
        colour = x[:, 8, 8] > 0
        expected = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "yellow": [1, 1, 0]}
        assert colour.int().tolist() == expected[meta.classes[label].split()[2]]
