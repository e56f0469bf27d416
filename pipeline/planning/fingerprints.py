"""Fingerprints of what lies outside the store: they stand in a step's key for the bytes that it will read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.store.manifest import canonical, digest
from graftwork.specs.data import CaptionsData, Data, DataFiles, DigitsData, SyntheticData
from graftwork.specs.hub import is_hub_id, local_snapshot, parts_of
from graftwork.specs.problems import plain
from graftwork.stages.data.hashes import ImageHashes
from graftwork.stages.data.sources import are_here, identity, items, split
from graftwork.stages.stage import External

ABSENT = "absent"  # stands for what is not on this machine: a plan can be made, its keys are not those of a run
UNREAD = "unread"  # stands for contents that were never read: the keys are not those of a run either


class ChangedFiles(ValueError):
    """Files hold something else than they did when the plan hashed them; the text is the whole line."""


def fingerprint(external: External, contents: Contents) -> str:
    """Return the hash of a file, of all files of a folder, or of all parts of what a file is a part of; of a hub
    id, the revision that is in the local cache; ABSENT if it is not here, UNREAD if it has to be read first."""
    if is_hub_id(external.path):
        snapshot = local_snapshot(external.path)
        return f"{external.path}@{snapshot.name}" if snapshot else ABSENT
    place = Path(external.path)
    if place.is_dir():
        return _of_files(external, place, _names(place, external.role), contents)
    if len(parts := parts_of(place)) > 1:
        return _of_files(external, place.parent, [part.name for part in parts], contents)
    if not place.is_file():
        return ABSENT
    digests = contents.files(external.field, place, [""])
    return digests[0] if digests else UNREAD


def require_same(external: External, planned: str) -> None:
    """Raise ChangedFiles if it is on this machine, and no longer what had that fingerprint when it was planned."""
    if fingerprint(external, Contents()) not in (planned, ABSENT):
        accepted = "accepted: files that stay as they are while a job reads them, the same on all machines"
        problem = f"got {plain(external.path)}, which is not as the plan found it"
        raise ChangedFiles(f"{external.field}: {problem}; {accepted}")


def _of_files(external: External, place: Path, names: list[str], contents: Contents) -> str:
    digests = contents.files(external.field, place, names)
    return _hash([[name, one] for name, one in zip(names, digests, strict=True)]) if digests is not None else UNREAD


def data_fingerprint(data: Data, contents: Contents) -> tuple[dict[str, str], ImageHashes | None]:
    """Return that of the digits' file, or of the images that the job chose, by content unless `data.trust` says
    otherwise; and what each image holds, as far as that was read."""
    if isinstance(data, DigitsData):
        return {"digits": digest(digits_file())}, None
    assert not isinstance(data, SyntheticData)  # a step that reads prompts names their file
    if not are_here(data):
        return {"images": ABSENT}, None
    if data.trust == "times":
        return _times(data), None
    hashes = contents.images(data)
    return {"images": hashes.root if hashes else UNREAD}, hashes


def _times(data: DataFiles) -> dict[str, str]:
    """Return the fingerprint of the images by their names, sizes and times."""
    chosen = items(data) if data.skip_broken else [item for part in split(data) for item in part]
    listing: list[list[object]] = [list(identity(data))] if isinstance(data, CaptionsData) else []
    for item in chosen:
        try:
            if item.span is not None:
                found = Path(item.span.file).stat()
                listing.append([item.name, item.label, item.span.offset, item.span.size, found.st_mtime_ns])
                continue
            found = (Path(data.path) / item.name).stat()
            listing.append([item.name, item.label, found.st_size, found.st_mtime_ns])
        except OSError:  # a link to nothing
            listing.append([item.name, item.label])
    return {"images": _hash(listing)}


def _names(place: Path, role: str) -> list[str]:
    """Return the files of a folder that are read: those right in one of reference images, else all below it."""
    if role == "reference":
        return sorted(entry.name for entry in os.scandir(place) if entry.is_file() and not entry.name.startswith("."))
    return [file.relative_to(place).as_posix() for file in sorted(place.rglob("*")) if file.is_file()]


def _hash(listing: list[list[object]]) -> str:
    return hashlib.sha256(canonical(listing).encode(errors="surrogateescape")).hexdigest()


def digits_file() -> Path:
    """Return where scikit-learn keeps its digits, found without importing it."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
