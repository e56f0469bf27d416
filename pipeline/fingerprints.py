"""Fingerprints of what lies outside the store: they stand in a step's key for the bytes that it will read."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from graftwork.pipeline.store import canonical, digest
from graftwork.specs.data import Data, DigitsData
from graftwork.specs.hub import is_hub_id, local_snapshot
from graftwork.stages.sources import class_folders

ABSENT = "absent"  # stands for what is not on this machine: a plan can be made, its keys are not those of a run


def data_fingerprint(data: Data) -> dict[str, str]:
    """The digits' file by content; an image folder by the names, sizes and times of the images in it."""
    if isinstance(data, DigitsData):
        return {"digits": digest(digits_file())}
    home = Path(data.path)
    if not home.is_dir():
        return {"images": ABSENT}
    folders = class_folders(data).items()
    return _hashed("images", [_stat(f"{folder}/{name}", home) for folder, names in folders for name in names])


def _stat(name: str, home: Path) -> list[object]:
    try:
        found = (home / name).stat()
    except OSError:  # a link to nothing
        return [name]
    return [name, found.st_size, found.st_mtime_ns]


def reference_fingerprint(path: str) -> dict[str, str]:
    """What samples are held against: statistics by content, or a folder of images."""
    return (
        images_fingerprint("reference", Path(path)) if Path(path).is_dir() else weights_fingerprint("reference", path)
    )


def weights_fingerprint(role: str, path: str) -> dict[str, str]:
    """A file, or all files of a folder, by content; a hub id by the revision that is in the local cache."""
    if is_hub_id(path):
        snapshot = local_snapshot(path)
        return {role: f"{path}@{snapshot.name}" if snapshot else ABSENT}
    place = Path(path)
    if place.is_dir():
        return _hashed(role, [[name, digest(file)] for name, file in _files(place)])
    return {role: digest(place) if place.is_file() else ABSENT}


def images_fingerprint(role: str, folder: Path) -> dict[str, str]:
    """A folder that may be too large to read: the names, sizes and times of its files."""
    if not folder.is_dir():
        return {role: ABSENT}
    stats = ((name, file.stat()) for name, file in _files(folder))
    return _hashed(role, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _hashed(role: str, listing: list[list[object]]) -> dict[str, str]:
    return {role: hashlib.sha256(canonical(listing).encode(errors="surrogateescape")).hexdigest()}


def digits_file() -> Path:
    """Where scikit-learn keeps its digits, found without importing it."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
