"""Which tars `data.path` means, and from where the names of their images go.

    in/00000.tar    one tar
    in              a folder of tars, in it or in folders below it
    in/0000?.tar    a glob of tars

An image is called `00000.tar/cat.jpg` in all three, so that one set of tars has one key, however it is named.
"""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

SUFFIX = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4|z))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
MAGIC = re.compile(r"[*?[]")


def is_shard(name: str) -> bool:
    """Return whether a file's name is that of a tar, or of a compressed one, which its reader refuses."""
    return SUFFIX.search(name) is not None


def shards_at(path: str) -> list[str]:
    """Return the tars that a path or a glob names, by their paths below `home_of`; none if it is a folder's."""
    place = Path(path)
    if place.is_dir():
        return []
    if place.exists():
        return [place.name]
    home = home_of(path)
    pattern = str(place.relative_to(home))
    return sorted(glob(pattern, root_dir=home, recursive=True)) if _is_glob(path) else []  # noqa: PTH207  # no hidden


def home_of(path: str) -> str:
    """Return the folder below which images have their names: the path, or what lies before a tar or a glob's signs."""
    place = Path(path)
    if place.is_dir():
        return path
    if place.exists() or not _is_glob(path):
        return str(place.parent)
    first = next(number for number, part in enumerate(place.parts) if MAGIC.search(part))
    return str(Path(*place.parts[:first]))


def _is_glob(path: str) -> bool:
    return MAGIC.search(path) is not None
