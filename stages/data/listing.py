"""The files of a folder of images: which of them count as images, to which class each belongs, and what is left out.

A class is a folder right below the data's. Its images lie in it or, if none do, all in one folder below it, as
Tiny-ImageNet's in `n01443537/images`. Nothing that is hidden counts. Names are as the file system has them: what is not
UTF-8 in them is escaped, see `specs.problems.text`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graftwork.specs.data import ImageFolderData
from graftwork.specs.problems import first_few, plain, shown, text
from graftwork.stages.data.images import IMAGE_SUFFIXES

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
LISTING_THREADS = 16  # folders that are listed at once: over a network, each takes a while
MAX_ORDER_BYTES = 2**24  # of a file that names the classes
MAX_NAMED = 5  # folders, files or kinds of files in a line


@dataclass(frozen=True)
class ClassFolder:
    """A class: its images by their path below its folder, and what else lies there."""

    name: str
    images: list[str]  # in no order
    left_out: Mapping[str, int] = field(default_factory=dict)  # suffix -> files that are no images by it
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # folder below -> images in it that are not the class's

    @property
    def ambiguous(self) -> bool:
        """Whether its images lie in several folders below it, so that these may be the classes."""
        return not self.images and bool(self.elsewhere)

    @property
    def is_split(self) -> bool:
        return self.name.lower() in SPLIT_NAMES

    @property
    def has_folders(self) -> bool:
        """Whether images lie below folders of its own."""
        return bool(self.elsewhere) or "/" in "".join(self.images[:1])


@dataclass(frozen=True)
class Listing:
    """The class folders in the order of the labels, and what lies beside them."""

    path: str
    folders: tuple[ClassFolder, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)  # suffix -> files beside the class folders

    @property
    def num_images(self) -> int:
        return sum(len(folder.images) for folder in self.folders)

    def kinds_left_out(self) -> Counter[str]:
        """Count the files that are no images, by suffix."""
        return sum((Counter(folder.left_out) for folder in self.folders), Counter(self.left_out))

    def left_out_line(self) -> str | None:
        """Return a line that counts the files that are not read, by suffix, and the images in folders too many."""
        kinds = self.kinds_left_out()
        parts = [counted(kinds)] if kinds else []
        deeper = {f"{one.name}/{below}": count for one in self.folders for below, count in one.elsewhere.items()}
        if deeper:
            parts.append(f"images in folders below those of a class: {sum(deeper.values()):,} ({listed(deeper)})")
        return f"data.path: left out, by suffix: {'; '.join(parts)}" if parts else None

    def nested(self) -> str | None:
        """Return a line if folders are splits of the data, or have the classes below them."""
        got, accepted = f"data.path: got {text(self.path)!r}", "accepted: a folder with one folder a class"
        below = [one for one in self.folders if one.ambiguous or (one.is_split and one.has_folders)]
        if below:
            folders = list(below[0].elsewhere) or [str(Path(image).parent) for image in below[0].images]
            inner = os.path.commonpath([Path(folder).parent for folder in folders])
            named = listed(sorted({folder.partition("/")[0] for folder in folders}))
            place = plain(text(str(Path(self.path) / below[0].name / inner)))
            whose = f"whose folder {shown(text(below[0].name))} has the images in folders of its own, {named}"
            return f"{got}, {whose}; {accepted}, such as {place}"
        if len(self.folders) > 1 and all(one.is_split for one in self.folders):
            return (
                f"{got}, whose folders are splits, not classes: {listed(one.name for one in self.folders)}; {accepted}"
            )
        return None

    def empty(self) -> str | None:
        """Return a line if a class has no images, with the files that it has."""
        empty = [one for one in self.folders if not one.images]
        if not empty:
            return None
        kinds = {one.name: f" ({counted(one.left_out)})" if one.left_out else "" for one in empty}
        named = listed(kinds, kinds)
        accepted = "accepted: images in each folder, since folders are classes"
        return f"data.path: got {text(self.path)!r}, with none in {named}; {accepted}"


def listed(names: Iterable[str], notes: Mapping[str, str] | None = None) -> str:
    """Return the first names as an error shows them, each with its note, and how many more there are."""
    return first_few([shown(text(name)) + (notes or {}).get(name, "") for name in names], MAX_NAMED)


def counted(kinds: Mapping[str, int]) -> str:
    """Return `12 .heic, 3 .txt`: the most frequent suffixes first."""
    ordered = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    parts = [f"{count:,} {plain(text(suffix)) or 'without a suffix'}" for suffix, count in ordered[:MAX_NAMED]]
    rest = sum(count for _, count in ordered[MAX_NAMED:])
    return ", ".join(parts) + (f", {rest:,} others" if rest else "")


_REQUEST: ContextVar[dict[str, Any] | None] = ContextVar("listings", default=None)
T = TypeVar("T")


@contextmanager
def listing_once() -> Iterator[None]:
    """Within it, each folder is listed once, however often it is asked for."""
    if _REQUEST.get() is not None:
        yield
        return
    token = _REQUEST.set({})
    try:
        yield
    finally:
        _REQUEST.reset(token)


def list_images(data: ImageFolderData) -> Listing:
    """Return the class folders below `data.path`, in the order of their labels; raise OSError, and ValueError with a
    line if `data.classes` names a file that does not fit them."""
    order = data.classes if isinstance(data.classes, str) else ""
    return listed_once(f"folders\0{data.path}\0{order}", lambda: _list(data))


def listed_once(key: str, listing: Callable[[], T]) -> T:
    """Return what `listing` gives; within `listing_once`, what it gave before under this key."""
    known = _REQUEST.get()
    if known is None:
        return listing()
    if key not in known:
        known[key] = listing()
    found: T = known[key]
    return found


def _list(data: ImageFolderData) -> Listing:
    home, names, loose = Path(data.path), [], Counter[str]()
    for name in os.listdir(home):  # noqa: PTH208  # a path object a file takes ten times as long
        if name.startswith("."):
            continue
        if (home / name).is_dir():
            names.append(name)
        else:
            loose[_suffix(name)] += 1
    ordered = in_order(names) if not isinstance(data.classes, str) else read_order(data.classes, names)
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        folders = tuple(pool.map(lambda name: _class_folder(home / name), ordered))
    return Listing(data.path, folders, loose)


def in_order(names: Collection[str]) -> list[str]:
    """Sort class folders as their labels go: by number if all names are digits, by name otherwise."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_order(file: str, names: Collection[str]) -> list[str]:
    """Return the class folders as a file orders them, a line each: a folder's name, or that and words after it.

    Raise ValueError with a line if it does not name each folder once.
    """
    lines = order_lines(file)
    places: dict[str, int] = {}
    for number, line in lines:
        name = line if line in names else line.split()[0]
        if name not in names:
            raise _misfit(file, f"whose line {number}, {shown(line)}, is no folder of the data")
        if name in places:
            raise _misfit(file, f"which names {shown(name)} in the lines {places[name]} and {number}")
        places[name] = number
    if extra := sorted(set(names) - places.keys()):
        raise _misfit(file, f"which does not name the folder {listed(extra)}")
    return list(places)


def order_lines(file: str) -> list[tuple[int, str]]:
    """Return the lines of a file that names the classes, with their numbers; raise ValueError with a line."""
    try:
        if not Path(file).is_file():
            raise _misfit(file, "which is a folder" if Path(file).is_dir() else "no such file")
        if Path(file).stat().st_size > MAX_ORDER_BYTES:
            raise _misfit(file, "which is too large for a list of classes")
        content = Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        content = "\0"
    except OSError as error:
        raise _misfit(file, f"which cannot be read ({error.strerror})") from None
    if "\0" in content:
        raise _misfit(file, "which is no text in UTF-8")
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise _misfit(file, "which is empty")
    return lines


def _misfit(file: str, problem: str) -> ValueError:
    accepted = "a file that names each class folder once, a line each, in the order of the labels"
    return ValueError(f"data.classes: got {plain(text(file))!r}, {problem}; accepted: a number, or {accepted}")


def _class_folder(folder: Path) -> ClassFolder:
    images, left_out, folders = _files(folder)
    below = _below(folder, folders)
    if not images and len(below) == 1:
        (inner, (names, others)) = next(iter(below.items()))
        return ClassFolder(folder.name, [f"{inner}/{name}" for name in names], dict(left_out + others))
    elsewhere = {inner: len(names) for inner, (names, _) in below.items()}
    return ClassFolder(folder.name, images, dict(left_out), elsewhere)


def _below(folder: Path, names: Sequence[str]) -> dict[str, tuple[list[str], Counter[str]]]:
    """Return the folders with images, at any depth below a class folder: their images and what is left out."""
    contents = {}
    identities = {_identity(folder)}
    waiting = sorted(names, reverse=True)
    while waiting:
        name = waiting.pop()
        if (identity := _identity(folder / name)) in identities:  # a link back to where it lies
            continue
        identities.add(identity)
        images, left_out, folders = _files(folder / name)
        if images:
            contents[name] = (images, left_out)
        waiting += [f"{name}/{inner}" for inner in sorted(folders, reverse=True)]
    return contents


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _files(folder: Path) -> tuple[list[str], Counter[str], list[str]]:
    """Return the names of the images right in a folder, the other files by suffix, and the folders."""
    images, left_out, folders = [], Counter[str](), []
    for name in os.listdir(folder):  # noqa: PTH208
        if name[0] == ".":
            continue
        if name[name.rfind(".") :].lower() in IMAGE_SUFFIXES:  # `_suffix`, in a third of the time
            images.append(name)
        elif (folder / name).is_dir():
            folders.append(name)
        else:
            left_out[_suffix(name)] += 1
    return images, left_out, folders


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
