"""Fingerprints of what lies outside the store: they stand in a step's key for the bytes that it will read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from graftwork.pipeline.contents import Contents
from graftwork.pipeline.store import canonical, digest
from graftwork.specs.data import Data, DigitsData, ImageFolderData
from graftwork.specs.hub import is_hub_id, local_snapshot, parts_of
from graftwork.stages.hashes import ImageHashes
from graftwork.stages.sources import items, split

ABSENT = "absent"  # stands for what is not on this machine: a plan can be made, its keys are not those of a run
UNREAD = "unread"  # stands for contents that were never read: the keys are not those of a run either


def data_fingerprint(data: Data, contents: Contents) -> tuple[dict[str, str], ImageHashes | None]:
    """Return that of the digits' file, or of the images that the job chose, by content unless `data.trust` says
    otherwise; and what each image holds, as far as that was read."""
    if isinstance(data, DigitsData):
        return {"digits": digest(digits_file())}, None
    if not Path(data.path).is_dir():
        return {"images": ABSENT}, None
    if data.trust == "times":
        return _times(data), None
    hashes = contents.images(data)
    return {"images": hashes.root if hashes else UNREAD}, hashes


def _times(data: ImageFolderData) -> dict[str, str]:
    """Return the fingerprint of the images by their names, sizes and times."""
    chosen = items(data) if data.skip_broken else [item for part in split(data) for item in part]
    listing: list[list[object]] = []
    for item in chosen:
        try:
            found = (Path(data.path) / item.name).stat()
            listing.append([item.name, item.label, found.st_size, found.st_mtime_ns])
        except OSError:  # a link to nothing
            listing.append([item.name, item.label])
    return _hashed("images", listing)


def reference_fingerprint(path: str, contents: Contents) -> dict[str, str]:
    """Return that of what samples are held against: statistics, or the files right in a folder of images."""
    if not Path(path).is_dir():
        return weights_fingerprint("reference", path, contents, "evaluate.reference")
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith("."))
    return _folder("reference", Path(path), names, contents, "evaluate.reference")


def weights_fingerprint(role: str, path: str, contents: Contents, field: str) -> dict[str, str]:
    """Return that of a file, or of all files of a folder; of a hub id, the revision that is in the local cache."""
    if is_hub_id(path):
        snapshot = local_snapshot(path)
        return {role: f"{path}@{snapshot.name}" if snapshot else ABSENT}
    place = Path(path)
    if place.is_dir():
        names = [file.relative_to(place).as_posix() for file in sorted(place.rglob("*")) if file.is_file()]
        return _folder(role, place, names, contents, field)
    if len(parts := parts_of(place)) > 1:
        return _folder(role, place.parent, [part.name for part in parts], contents, field)
    if not place.is_file():
        return {role: ABSENT}
    found = contents.files(field, place, [""])
    return {role: found[0] if found else UNREAD}


def _folder(role: str, place: Path, names: list[str], contents: Contents, field: str) -> dict[str, str]:
    found = contents.files(field, place, names)
    if found is None:
        return {role: UNREAD}
    return _hashed(role, [[name, one] for name, one in zip(names, found, strict=True)])


def _hashed(role: str, listing: list[list[object]]) -> dict[str, str]:
    return {role: hashlib.sha256(canonical(listing).encode(errors="surrogateescape")).hexdigest()}


def digits_file() -> Path:
    """Return where scikit-learn keeps its digits, found without importing it."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
