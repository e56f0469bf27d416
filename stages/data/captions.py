"""Images with captions: which image has which, by a file of them all or by a text beside each image.

    metadata.jsonl    a JSON object a line, with `file_name` (the path below the folder) and `text`; or
    metadata.csv      the same two columns; or
    cat.txt           beside cat.jpg, in the folder or in folders below it

Nothing that is hidden counts. Names are as the file system has them, see `specs.problems.text`. White space in a
caption counts as one blank.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.specs.data import CaptionsData
from graftwork.specs.problems import is_text, plain, shown, text
from graftwork.stages.data.images import IMAGE_SUFFIXES
from graftwork.stages.data.listing import counted, listed, listed_once

TABLES = ("metadata.jsonl", "metadata.csv")
ACCEPTED = "a folder of images with metadata.jsonl or metadata.csv (file_name, text), or with a .txt beside each image"
MAX_TABLE_BYTES = 2**31
MAX_CAPTION_BYTES = 2**20  # of a .txt beside an image
MAX_FIELD = 2**20  # characters of a field of a .csv


class UnfitCaptions(ValueError):
    """Captions that cannot be read, or that are not those of the images; the message is the whole line."""


@dataclass(frozen=True)
class Captions:
    """The caption of each image, by its path below the folder, in the order of these paths."""

    by_image: Mapping[str, str]
    left_out: Mapping[str, int] = field(default_factory=dict)  # suffix -> files that are neither image nor caption

    def different(self) -> tuple[str, ...]:
        """Return the captions, each once, in their own order: an image's label is the number of its caption there."""
        return tuple(sorted(set(self.by_image.values())))

    def line(self) -> str:
        """Return a line that counts images and captions."""
        return f"{len(self.by_image):,} images with {len(set(self.by_image.values())):,} different captions"

    def left_out_line(self) -> str | None:
        """Return a line that counts the files that are not read, by suffix."""
        return f"data.path: left out, by suffix: {counted(self.left_out)}" if self.left_out else None


def read_captions(data: CaptionsData) -> Captions:
    """Return the captions of the images below `data.path`; raise OSError, and UnfitCaptions with a line."""
    return listed_once(f"captions\0{data.path}", lambda: _Folder(data.path).captions())


class _Folder:
    """The files of a folder and of those below it, and what is said where they do not fit."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = sorted(_files(path))
        self.images = [name for name in self.files if _suffix(name) in IMAGE_SUFFIXES]

    def captions(self) -> Captions:
        tables = [name for name in TABLES if name in self.files]
        if len(tables) > 1:
            raise self.misfit(f"with both {' and '.join(tables)}")
        by_image = self._of_table(tables[0]) if tables else self._beside_images()
        self._require_matching(by_image)
        empty = [name for name, caption in by_image.items() if not caption]
        if empty:
            raise self.misfit(f"with {len(empty)} empty captions, of {listed(empty)}", "a caption for each image")
        used = {*by_image, *tables, *(() if tables else map(_beside, by_image))}
        left_out = Counter(_suffix(name) for name in self.files if name not in used)
        return Captions(dict(sorted(by_image.items())), left_out)

    def misfit(self, problem: str, accepted: str = ACCEPTED) -> UnfitCaptions:
        return UnfitCaptions(f"data.path: got {text(self.path)!r}, {problem}; accepted: {accepted}")

    def _require_matching(self, by_image: Mapping[str, str]) -> None:
        """Raise UnfitCaptions for captions without an image, and for images without a caption."""
        if not self.images and not by_image:
            raise self.misfit(f"without images{self._instead()}")
        here = set(self.images)
        if absent := [name for name in by_image if name not in here]:
            files = set(self.files)
            what = "which are no images by their suffix" if files.issuperset(absent) else "which are not there"
            some = f"{len(absent):,} captions of files {what}: {listed(absent)}"
            raise self.misfit(f"with {some}", "images that are there")
        if bare := [name for name in self.images if name not in by_image]:
            some = f"{len(bare):,} of {len(here):,} images without a caption: {listed(bare)}"
            raise self.misfit(f"with {some}", ACCEPTED if len(bare) == len(here) else "a caption for each image")

    def _instead(self) -> str:
        kinds = Counter(_suffix(name) for name in self.files)
        return f", but {counted(kinds)}" if kinds else ""

    # -- a text beside each image

    def _beside_images(self) -> dict[str, str]:
        found, texts = {}, {name for name in self.files if _suffix(name) == ".txt"}
        stems = Counter(map(_beside, self.images))
        if twice := [name for name in self.images if stems[_beside(name)] > 1]:
            raise self.misfit(f"with images of one name for one text: {listed(twice)}", "a name for each image")
        for name in self.images:
            if (beside := _beside(name)) in texts:
                found[name] = _one_line(self._read(beside, MAX_CAPTION_BYTES))
        alone = sorted(texts - set(stems))
        if alone and found:
            some = f"{len(alone):,} captions without an image: {listed(alone)}"
            raise self.misfit(f"with {some}", "an image for each .txt")
        return found

    # -- a file of them all

    def _of_table(self, table: str) -> dict[str, str]:
        content = self._read(table, MAX_TABLE_BYTES)
        rows = self._json_rows(table, content) if table.endswith(".jsonl") else self._csv_rows(table, content)
        found: dict[str, str] = {}
        lines: dict[str, int] = {}
        for number, file_name, caption in rows:
            name = self._name(table, number, file_name)
            if name in found:
                problem = f"names {shown(text(name))} in the lines {lines[name]} and {number}"
                raise self.misfit(f"whose {table} {problem}", "each image once")
            found[name], lines[name] = _one_line(caption), number
        return found

    def _json_rows(self, table: str, content: str) -> Iterator[tuple[int, str, str]]:
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise self._bad_line(table, number, f"is no JSON object: {shown(line)}")
            yield number, *self._two_fields(table, number, row)

    def _csv_rows(self, table: str, content: str) -> Iterator[tuple[int, str, str]]:
        csv.field_size_limit(MAX_FIELD)
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        try:
            for row in reader:
                yield reader.line_num, *self._two_fields(table, reader.line_num, row)
        except csv.Error as error:
            raise self._bad_line(table, reader.line_num, f"is no CSV ({error})") from None

    def _two_fields(self, table: str, number: int, row: Mapping[str, object]) -> tuple[str, str]:
        values = []
        for name in ("file_name", "text"):
            value = row.get(name)
            if not isinstance(value, str):
                has = ", ".join(shown(str(one)) for one in list(row)[:8]) or "nothing"
                what = f"no {name}" if value is None else f"a {name} that is no text, {shown(value)}"
                raise self._bad_line(table, number, f"has {what}, but {has}")
            if not is_text(value):
                raise self._bad_line(table, number, f"has a {name} with half a character, {shown(value)}")
            values.append(value)
        return values[0], values[1]

    def _name(self, table: str, number: int, file_name: str) -> str:
        name = posixpath.normpath(file_name)
        if not file_name or "\0" in file_name or name.startswith(("/", "..")) or name == ".":
            raise self._bad_line(table, number, f"has the file_name {shown(file_name)}, no path below the folder")
        return name

    def _bad_line(self, table: str, number: int, problem: str) -> UnfitCaptions:
        return self.misfit(f"whose {table} in line {number} {problem}", "file_name and text in each line")

    def _read(self, name: str, most: int) -> str:
        """Return the text of a file. Raise UnfitCaptions if it is none, or too large for what it is."""
        place = Path(self.path) / name
        try:
            if place.stat().st_size > most:
                raise self.misfit(f"whose {plain(text(name))} is larger than {most:,} bytes", "captions")
            content = place.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = place.read_bytes()[: error.start].count(b"\n") + 1
            raise self.misfit(f"whose {plain(text(name))} in line {line} is no UTF-8", "captions in UTF-8") from None
        except OSError as error:
            problem = f"whose {plain(text(name))} cannot be read ({error.strerror})"
            raise self.misfit(problem, "captions that can be read") from None
        if "\0" in content:
            raise self.misfit(f"whose {plain(text(name))} is no text", "captions in UTF-8")
        return content


def _files(path: str) -> Iterator[str]:
    """Yield the files below a folder by their paths; links to folders are followed no further than to the first."""
    seen = set()
    for folder, below, names in os.walk(path, followlinks=True, onerror=_raise):
        place = os.path.realpath(folder)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        below[:] = [name for name in below if not name.startswith(".")]
        inner = os.path.relpath(folder, path)
        yield from (name if inner == "." else f"{inner}/{name}" for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _beside(name: str) -> str:
    return f"{posixpath.splitext(name)[0]}.txt"


def _one_line(caption: str) -> str:
    return " ".join(caption.split())
