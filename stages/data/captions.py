"""Images with captions: which image has which, by a file of them all or by a text beside each image.

    metadata.jsonl    a JSON object a line, with `file_name` (the path below the folder) and `text`; or
    metadata.csv      the same two columns; or
    cat.txt           beside cat.jpg, in the folder or in folders below it; or
    00000.tar         webdataset's, with cat.jpg and cat.txt or cat.json in it, see `stages.data.webdataset`

Nothing that is hidden counts. Names are as the file system has them, see `specs.problems.text`. White space in a
caption counts as one blank.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.specs.data import CaptionsData
from graftwork.specs.problems import is_text, plain, shown, text
from graftwork.stages.data.caption_files import (
    ACCEPTED,
    UnfitCaptions,
    decode_text,
    files_below,
    misfit,
    one_line,
)
from graftwork.stages.data.images import IMAGE_SUFFIXES
from graftwork.stages.data.listing import counted, listed, listed_once
from graftwork.stages.data.shards import is_shard, shards_at
from graftwork.stages.data.tars import Span
from graftwork.stages.data.webdataset import MAX_CAPTION_BYTES, read_samples

TABLES = ("metadata.jsonl", "metadata.csv")
MAX_TABLE_BYTES = 2**31
MAX_FIELD = 2**20  # characters of a field of a .csv


@dataclass(frozen=True)
class Captions:
    """The caption of each image, by its path below the folder, in the order of these paths."""

    by_image: Mapping[str, str]
    left_out: Mapping[str, int] = field(default_factory=dict)  # suffix -> files that are neither image nor caption
    spans: Mapping[str, Span] = field(default_factory=dict)  # of each image in a tar, by its name

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
    """Return the captions of the images of `data.path`; raise OSError, and UnfitCaptions with a line."""
    return listed_once(f"captions\0{data.path}", lambda: _read(data.path))


def _read(path: str) -> Captions:
    if not Path(path).is_dir():
        return _in_tars(path, shards_at(path), Counter())
    folder = _Folder(path)
    if not folder.images and not folder.tables and (tars := [name for name in folder.files if is_shard(name)]):
        return _in_tars(path, tars, Counter(_suffix(name) for name in folder.files if not is_shard(name)))
    return folder.captions()


def _in_tars(path: str, tars: Sequence[str], beside: Counter[str]) -> Captions:
    """Return the captions of images in tars; raise UnfitCaptions.

    beside: suffix -> other files of the folder.
    """
    samples = read_samples(path, tars)
    if samples.alone and samples.captions:
        some = f"{len(samples.alone):,} captions without an image: {listed(samples.alone)}"
        raise misfit(path, f"with {some}", "an image for each caption")
    _require_captions(path, list(samples.spans), samples.captions, beside + samples.left_out)
    return Captions(dict(sorted(samples.captions.items())), beside + samples.left_out, samples.spans)


def _require_captions(
    path: str, images: Collection[str], by_image: Mapping[str, str], others: Mapping[str, int]
) -> None:
    """Raise UnfitCaptions if there are no images, or an image without a caption.

    others: suffix -> files that are neither.
    """
    if not images and not by_image:
        raise misfit(path, f"without images{f', but {counted(others)}' if others else ''}")
    if bare := [name for name in images if name not in by_image]:
        some = f"{len(bare):,} of {len(images):,} images without a caption: {listed(bare)}"
        raise misfit(path, f"with {some}", ACCEPTED if len(bare) == len(images) else "a caption for each image")
    if empty := [name for name, caption in by_image.items() if not caption]:
        raise misfit(path, f"with {len(empty)} empty captions, of {listed(empty)}", "a caption for each image")


class _Folder:
    """The files of a folder and of those below it, and what is said where they do not fit."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = sorted(files_below(path))
        self.images = [name for name in self.files if _suffix(name) in IMAGE_SUFFIXES]
        self.tables = [name for name in TABLES if name in self.files]

    def captions(self) -> Captions:
        if len(self.tables) > 1:
            raise self.misfit(f"with both {' and '.join(self.tables)}")
        by_image = self._of_table(self.tables[0]) if self.tables else self._beside_images()
        self._require_images(by_image)
        _require_captions(self.path, self.images, by_image, Counter(map(_suffix, self.files)))
        used = {*by_image, *self.tables, *(() if self.tables else map(_beside, by_image))}
        left_out = Counter(_suffix(name) for name in self.files if name not in used)
        return Captions(dict(sorted(by_image.items())), left_out)

    def misfit(self, problem: str, accepted: str = ACCEPTED) -> UnfitCaptions:
        return misfit(self.path, problem, accepted)

    def _require_images(self, by_image: Mapping[str, str]) -> None:
        """Raise UnfitCaptions for captions without an image."""
        here = set(self.images)
        if absent := [name for name in by_image if name not in here]:
            files = set(self.files)
            what = "which are no images by their suffix" if files.issuperset(absent) else "which are not there"
            some = f"{len(absent):,} captions of files {what}: {listed(absent)}"
            raise self.misfit(f"with {some}", "images that are there")

    # -- a text beside each image

    def _beside_images(self) -> dict[str, str]:
        found, texts = {}, {name for name in self.files if _suffix(name) == ".txt"}
        stems = Counter(map(_beside, self.images))
        if twice := [name for name in self.images if stems[_beside(name)] > 1]:
            raise self.misfit(f"with images of one name for one text: {listed(twice)}", "a name for each image")
        for name in self.images:
            if (beside := _beside(name)) in texts:
                found[name] = one_line(self._read(beside, MAX_CAPTION_BYTES))
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
            found[name], lines[name] = one_line(caption), number
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
            content = place.read_bytes()
        except OSError as error:
            problem = f"whose {plain(text(name))} cannot be read ({error.strerror})"
            raise self.misfit(problem, "captions that can be read") from None
        return decode_text(self.path, name, content)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _beside(name: str) -> str:
    return f"{posixpath.splitext(name)[0]}.txt"
