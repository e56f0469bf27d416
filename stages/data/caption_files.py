"""The files among which images and captions lie: their names, what they hold as text, and the line of a misfit."""

from __future__ import annotations

import os
from collections.abc import Iterator

from graftwork.specs.problems import plain, text

ACCEPTED = (
    "a folder of images with metadata.jsonl or metadata.csv (file_name, text), or with a .txt beside each image; or "
    "webdataset's tars: a .tar, a folder of them, or a glob"
)


class UnfitCaptions(ValueError):
    """Captions that cannot be read, or that are not those of the images; the message is the whole line."""


def misfit(path: str, problem: str, accepted: str = ACCEPTED) -> UnfitCaptions:
    """Return the error about `data.path` with that problem."""
    return UnfitCaptions(f"data.path: got {text(path)!r}, {problem}; accepted: {accepted}")


def decode_text(path: str, name: str, content: bytes) -> str:
    """Return what a file below `data.path` says; raise UnfitCaptions if that is no text in UTF-8."""
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise misfit(path, f"whose {plain(text(name))} in line {line} is no UTF-8", "captions in UTF-8") from None
    if "\0" in decoded:
        raise misfit(path, f"whose {plain(text(name))} is no text", "captions in UTF-8")
    return decoded


def one_line(caption: str) -> str:
    """Return a caption with one blank for each white space."""
    return " ".join(caption.split())


def files_below(path: str) -> Iterator[str]:
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
