"""Webdataset's samples: files in a tar that have one key, such as `cat.jpg` and `cat.txt`.

A key is a file's path up to the first dot of its base name (webdataset's `base_plus_ext`), within its tar. A sample's
image is the file whose suffix, all behind that dot, is that of an image; its caption is in the .txt, or in `caption` or
else `text` of the .json. Files of other suffixes, such as `cat.mask.png`, are left out, and what is hidden does not
count. The samples of two tars are never one.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.specs.problems import is_text, plain, shown, text
from graftwork.stages.data.caption_files import decode_text, misfit, one_line
from graftwork.stages.data.images import IMAGE_SUFFIXES
from graftwork.stages.data.listing import LISTING_THREADS, listed
from graftwork.stages.data.shards import home_of
from graftwork.stages.data.tars import Span, UnfitTar, index

MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./]+)(?P<suffix>\.[^/]*)", re.DOTALL)
TEXT, JSON = ".txt", ".json"
FIELDS = ("caption", "text")  # of a .json: the first that is there
MAX_CAPTION_BYTES = 2**20  # of a .txt or .json
ACCEPTED_TARS = "whole tars that are not compressed"
ACCEPTED_JSON = "a JSON object with caption or text"


@dataclass
class Samples:
    """The images in tars with their captions, and what is there of either without the other."""

    spans: dict[str, Span] = field(default_factory=dict)  # of each image, by its name
    captions: dict[str, str] = field(default_factory=dict)  # by the image's name
    alone: list[str] = field(default_factory=list)  # files with a caption, without an image
    left_out: Counter[str] = field(default_factory=Counter)  # suffix -> files that are neither image nor caption

    def add(self, other: Samples) -> None:
        self.spans |= other.spans
        self.captions |= other.captions
        self.alone += other.alone
        self.left_out += other.left_out


def read_samples(path: str, tars: Sequence[str]) -> Samples:
    """Return the samples of the tars of `data.path`; raise UnfitCaptions if one cannot be read."""
    samples = Samples()
    with ThreadPoolExecutor(LISTING_THREADS) as pool:  # over a network, each tar takes a while
        for some in pool.map(lambda tar: _Shard(path, tar).samples(), tars):
            samples.add(some)
    return samples


class _Shard:
    """The files of a tar by their names, such as `00000.tar/cat.jpg`, and what is said where they do not fit."""

    def __init__(self, path: str, tar: str) -> None:
        self.path, self.tar = path, tar
        self.file = str(Path(home_of(path)) / tar)
        self.spans = self._files()

    def samples(self) -> Samples:
        images = self._by_key("images", IMAGE_SUFFIXES)
        texts = self._by_key("captions", {JSON}) | self._by_key("captions", {TEXT})
        captions = {key: caption for key, file in texts.items() if (caption := self._caption(file)) is not None}
        used = {*images.values(), *(texts[key] for key in captions if key in images)}
        return Samples(
            {image: self.spans[image] for image in images.values()},
            {image: captions[key] for key, image in images.items() if key in captions},
            [texts[key] for key in captions if key not in images],
            Counter(_suffix(file) for file in self.spans if file not in used),
        )

    def _files(self) -> dict[str, Span]:
        whose = "which" if self.file == self.path else f"whose {plain(text(self.tar))}"
        try:
            members = index(self.file)
        except UnfitTar as error:
            raise misfit(self.path, f"{whose} {error}", ACCEPTED_TARS) from None
        except OSError as error:
            problem = f"{whose} cannot be read ({error.strerror})"
            raise misfit(self.path, problem, "tars that can be read") from None
        spans: dict[str, Span] = {}
        for member, span in members:
            name = posixpath.normpath(member).lstrip("/")
            if any(part.startswith(".") and part != ".." for part in name.split("/")):
                continue
            if f"{self.tar}/{name}" in spans:
                raise misfit(self.path, f"{whose} holds {shown(text(name))} twice", "each file once")
            spans[f"{self.tar}/{name}"] = span
        return spans

    def _by_key(self, kind: str, suffixes: Collection[str]) -> dict[str, str]:
        """Return the files of these suffixes by their keys; raise UnfitCaptions if a key has several."""
        by_key: dict[str, str] = {}
        for file in self.spans:
            parts = MEMBER.fullmatch(file)
            if parts is None or parts["suffix"].lower() not in suffixes:
                continue
            if (other := by_key.setdefault(parts["key"], file)) != file:
                raise misfit(self.path, f"with {kind} of one key: {listed([other, file])}", "one of a key")
        return by_key

    def _caption(self, file: str) -> str | None:
        """Return the caption in a .txt or .json; None if a .json has none."""
        span, whose = self.spans[file], f"whose {plain(text(file))}"
        if span.size > MAX_CAPTION_BYTES:
            raise misfit(self.path, f"{whose} is larger than {MAX_CAPTION_BYTES:,} bytes", "captions")
        try:
            content = decode_text(self.path, file, span.read())
        except OSError as error:
            raise misfit(self.path, f"{whose} cannot be read ({error.strerror})", "tars that can be read") from None
        if _suffix(file) == TEXT:
            return one_line(content)
        caption = self._of_json(whose, content)
        return None if caption is None else one_line(caption)

    def _of_json(self, whose: str, content: str) -> str | None:
        row = _json(content)
        if row is None:
            raise misfit(self.path, f"{whose} is no JSON object: {shown(content)}", ACCEPTED_JSON)
        name = next((name for name in FIELDS if row.get(name) is not None), None)
        caption = row[name] if name else None
        if caption is not None and not (isinstance(caption, str) and is_text(caption) and "\0" not in caption):
            raise misfit(self.path, f"{whose} has a {name} that is no text, {shown(caption)}", ACCEPTED_JSON)
        return caption


def _json(content: str) -> Mapping[str, object] | None:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _suffix(file: str) -> str:
    parts = MEMBER.fullmatch(file)
    return parts["suffix"].lower() if parts else ""
