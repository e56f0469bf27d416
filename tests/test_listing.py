"""Which files of a folder are images, of which class, and what is said of the others."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graftwork.pipeline import api
from graftwork.pipeline.cli.app import app
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning import preflight
from graftwork.specs.data import ImageFolderData
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import SpecError, load
from graftwork.stages.data.images import IMAGE_SUFFIXES
from graftwork.stages.data.listing import list_images, listing_once
from graftwork.stages.data.sources import class_folders, class_names, class_sizes, items, split
from tests.conftest import TINY

FEW = ["distill.samples=2", "distill.heldout=1"]


def photos(home: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, suffix: str = ".png") -> Path:
    for name in classes:
        (home / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (home / name / f"{number}{suffix}").touch()
    return home


def job(home: Path, **data: object) -> JobSpec:
    """The tiny job on a folder of images."""
    fields = "".join(f", {name}: '{value}'" for name, value in data.items())
    return load(TINY, [f"data={{kind: image_folder, path: '{home}', image_size: 16{fields}}}", *FEW])


def refusal(asked: JobSpec) -> str:
    """The one line with which a job is refused."""
    with pytest.raises(SpecError) as caught:
        preflight.check(asked)
    (line,) = caught.value.lines
    return line


def graft_plan(home: Path, *overrides: str) -> Result:
    given = [f"data={{kind: image_folder, path: '{home}', image_size: 16}}", *FEW, *overrides]
    return CliRunner().invoke(app, ["plan", str(TINY), *(part for one in given for part in ("--set", one))])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- which files count


@pytest.mark.parametrize("suffix", [*sorted(IMAGE_SUFFIXES), ".TIF", ".Jpeg"])
def test_every_image_that_is_read_is_listed_whatever_the_case_of_its_suffix(tmp_path: Path, suffix: str) -> None:
    assert class_sizes(ImageFolderData(path=str(photos(tmp_path / "photos", suffix=suffix)))) == (4, 4)


def test_files_that_are_left_out_are_counted_by_suffix_in_a_plan(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/c.svg", "dog/README", "notes.txt", "cat/.DS_Store", ".hidden"):
        (home / name).touch()
    done = graft_plan(home)
    assert done.exit_code == 0
    assert "graft: data.path: left out, by suffix: 2 .heic, 1 without a suffix, 1 .svg, 1 .txt\n" in done.stderr


def test_files_that_are_left_out_are_counted_by_suffix_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise Begun

    lines: list[str] = []
    view = SilentView()
    monkeypatch.setattr(view, "say", lines.append)
    monkeypatch.setattr(api, "Run", begin)
    home = photos(tmp_path / "photos")
    (home / "cat" / "a.heic").touch()
    with pytest.raises(Begun):
        api.run(job(home), view=view)
    assert "data.path: left out, by suffix: 1 .heic" in lines


def test_where_nothing_is_left_out_nothing_is_said(tmp_path: Path) -> None:
    assert preflight.notes(job(photos(tmp_path / "photos"))) == []


def test_images_below_a_class_that_has_its_own_are_counted_too(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    photos(home / "cat", ("thumbs",), 3)
    (line,) = preflight.notes(job(home))
    assert line.endswith("images in folders below those of a class: 3 ('cat/thumbs')")
    assert class_sizes(ImageFolderData(path=str(home))) == (4, 4)


def test_a_class_of_other_files_only_is_told_which(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    photos(home, ("elk",), 4, ".heic")
    (home / "fox").mkdir()
    line = refusal(job(home))
    assert line.startswith(f"data.path: got '{home}', with none in 'elk' (4 .heic), 'fox'; accepted: images in each")


def test_a_folder_of_other_files_only_is_told_which(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", suffix=".heic")
    assert refusal(job(home)).startswith(
        f"data.path: got '{home}', no images in class folders, but 8 .heic; accepted: "
    )


def test_of_many_classes_without_images_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", ("0", "1"))
    for number in range(2, 12):
        (home / str(number)).mkdir()
    assert "with none in '2', '3', '4', '5', '6' and 5 more; accepted: " in refusal(job(home))
    (tmp_path / "imagenet.pt").touch()
    fields = f"data={{kind: image_folder, path: '{home}', image_size: 16}}"
    (line,) = preflight.shortages(load(TINY, [fields, "weights={kind: checkpoint, path: imagenet.pt}", *FEW]))
    assert line.endswith("; weights.classes takes the rows of fewer classes from a checkpoint, without empty folders")


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = photos(tmp_path / "photos")
    listed = os.listdir

    def closed(path: Path) -> list[str]:  # for root, no folder is closed
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", closed)
    line = refusal(job(home))
    assert line.startswith(f"data.path: got '{home}', which cannot be read (Permission denied: {home}/dog); accepted: ")


# -- how folders lie


@pytest.mark.parametrize("below", ["images", "a/b/c"])
def test_images_in_a_folder_of_their_own_below_each_class_are_read(tmp_path: Path, below: str) -> None:
    home = tmp_path / "tiny-imagenet"
    for name in ("n01443537", "n01629819"):
        photos(home / name / below, (".",))
        (home / name / f"{name}_boxes.txt").touch()
    data = ImageFolderData(path=str(home))
    assert class_sizes(data) == (4, 4)
    assert items(data)[0].name == f"n01443537/{below}/0.png" and items(data)[-1].label == 1
    assert all((home / item.name).is_file() for part in split(data) for item in part)


@pytest.mark.parametrize("splits", [("train", "val"), ("train",), ("training", "test"), ("Train", "Validation")])
def test_a_parent_of_splits_is_refused_and_the_split_is_named(tmp_path: Path, splits: tuple[str, ...]) -> None:
    home = tmp_path / "data"
    for name in splits:
        photos(home / name, ("cat", "dog"))
    line = refusal(job(home))
    first = sorted(splits)[0]
    assert f"whose folder '{first}' has the images in folders of its own, 'cat', 'dog'; accepted: " in line
    assert line.endswith(f"such as {home}/{first}")
    assert graft_plan(home).exit_code == 2


def test_a_split_with_a_single_class_is_not_taken_for_a_class(tmp_path: Path) -> None:
    for name in ("train", "val"):
        photos(tmp_path / "data" / name, ("cat",))
    assert refusal(job(tmp_path / "data")).endswith(f"such as {tmp_path}/data/train")


def test_splits_without_class_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    home = photos(tmp_path / "data", ("test", "train"))
    assert "whose folders are splits, not classes: 'test', 'train'; accepted: " in refusal(job(home))


def test_a_folder_too_high_up_is_told_where_the_classes_lie(tmp_path: Path) -> None:
    photos(tmp_path / "all" / "imagenet" / "train", ("n0", "n1", "n2"))
    assert refusal(job(tmp_path / "all")).endswith(f"such as {tmp_path}/all/imagenet/train")


def test_linked_folders_are_read_and_a_link_to_where_it_lies_is_no_circle(tmp_path: Path) -> None:
    photos(tmp_path / "elsewhere", ("cats",))
    home = photos(tmp_path / "photos", ("dog",))
    (home / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (home / "dog" / "again").symlink_to(home / "dog")
    (home / "gone").symlink_to(tmp_path / "nowhere")
    data = ImageFolderData(path=str(home))
    assert class_sizes(data) == (4, 4)
    assert not any(folder.elsewhere for folder in list_images(data).folders)


# -- which label a class has


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (("0", "1", "10", "11", "2"), ("0", "1", "2", "10", "11")),
        (("0007", "010", "8"), ("0007", "8", "010")),
        (("1", "10", "2", "cat"), ("1", "10", "2", "cat")),
        (("1", "10", "²"), ("1", "10", "²")),
        (("n10", "n2"), ("n10", "n2")),
    ],
)
def test_class_folders_of_digits_go_by_number_and_all_others_by_name(
    tmp_path: Path, names: tuple[str, ...], ordered: tuple[str, ...]
) -> None:
    assert class_names(ImageFolderData(path=str(photos(tmp_path / "photos", names)))) == ordered


def test_a_plan_shows_which_label_each_class_has(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", tuple(map(str, range(12))))
    assert "12 classes, by number: 0 0, 1 1, 2 2," in graft_plan(home).stdout
    photos(home, ("cat",))
    assert "13 classes, by name: 0 0, 1 1, 2 10, 3 11, 4 2," in graft_plan(home).stdout
    assert ", .., 12 cat\n" in graft_plan(home).stdout


def ordered_by(home: Path, text: str | bytes) -> ImageFolderData:
    file = home.parent / "synsets.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ImageFolderData(path=str(home), classes=str(file))


@pytest.mark.parametrize(
    "lines", ["dog\ncat\n", "dog\r\ncat", "\ufeffdog n02\n\n  cat tabby, tom cat\n", "dog\ttench\ncat x"]
)
def test_a_file_orders_the_classes_as_imagenets_list_of_synsets_does(tmp_path: Path, lines: str) -> None:
    data = ordered_by(photos(tmp_path / "photos"), lines)
    assert list(class_folders(data)) == ["dog", "cat"]
    assert items(data)[0].name.startswith("dog/")


def test_a_folders_name_may_hold_spaces(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", ("great dane", "great"))
    assert class_names(ordered_by(home, "great dane\ngreat\n")) == ("great dane", "great")


MISFITS: dict[str, tuple[str | bytes, str]] = {
    "missing folder": ("cat\ndog\nelk\n", "whose line 3, 'elk', is no folder of the data"),
    "extra folder": ("cat\n", "which does not name the folder 'dog'"),
    "doubled line": ("cat\ndog\ncat tom\n", "which names 'cat' in the lines 1 and 3"),
    "empty": ("\n \n", "which is empty"),
    "binary": (b"cat\0dog", "which is no text in UTF-8"),
    "latin-1": (b"caf\xe9\n", "which is no text in UTF-8"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_file_of_classes_that_does_not_fit_is_one_line(tmp_path: Path, misfit: str) -> None:
    content, said = MISFITS[misfit]
    file = ordered_by(photos(tmp_path / "photos"), content).classes
    line = refusal(job(tmp_path / "photos", classes=file))
    assert line.startswith(f"data.classes: got '{file}', {said}; accepted: a number, or a file that names each class")


def test_a_folder_or_nothing_at_all_in_place_of_a_file_of_classes_is_one_line(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos")
    assert refusal(job(home, classes=home)).startswith(f"data.classes: got '{home}', which is a folder; accepted: ")
    assert refusal(job(home, classes=tmp_path / "no.txt")).startswith(f"data.classes: got '{tmp_path}/no.txt', no such")


@pytest.mark.parametrize("given", ["0", "true", "[cat, dog]", "2.5"])
def test_a_number_or_a_file_of_classes_is_one_line(given: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(TINY, [f"data={{kind: image_folder, path: x, classes: {given}}}"])
    (line,) = caught.value.lines
    assert line.startswith("data.classes: got ") and "accepted: a number from 1 on, or the path of a file" in line


def test_a_file_of_classes_tells_a_plan_their_number_where_the_images_are_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "synsets.txt").write_text("n0\nn1\nn2\n")
    cost = api.costs(job(tmp_path / "elsewhere", classes=tmp_path / "synsets.txt"))
    assert cost is not None and cost == api.costs(
        load(TINY, ["data={kind: image_folder, path: x, classes: 3, image_size: 16}", *FEW])
    )


# -- how often


def test_a_plan_lists_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = photos(tmp_path / "photos")
    seen: Counter[str] = Counter()
    listed = os.listdir

    def counting(path: Path) -> list[str]:
        seen[str(path)] += str(path).startswith(str(home))
        return listed(path)

    monkeypatch.setattr(os, "listdir", counting)
    assert graft_plan(home).exit_code == 0
    assert +seen == {str(home): 1, str(home / "cat"): 1, str(home / "dog"): 1}


def test_what_was_listed_is_forgotten_with_the_request(tmp_path: Path) -> None:
    data = ImageFolderData(path=str(photos(tmp_path / "photos")))
    with listing_once():
        assert class_sizes(data) == (4, 4)
        (tmp_path / "photos" / "cat" / "new.png").touch()
        assert class_sizes(data) == (4, 4)
    assert class_sizes(data) == (5, 4)
