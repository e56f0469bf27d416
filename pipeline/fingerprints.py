"""Fingerprints of what lies outside the store: they stand in a step's key for the bytes that it will read."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from pipeline.store import canonical, digest
from specs.data import Data, DigitsData


def data_fingerprint(data: Data) -> dict[str, str]:
    """The digits' file by content; an image folder by the names, sizes and times of its files."""
    if isinstance(data, DigitsData):
        return {"digits": digest(digits_file())}
    return folder_fingerprint("images", Path(data.path))


def file_fingerprint(role: str, path: str) -> dict[str, str]:
    """A file by content, a folder as above."""
    if Path(path).is_dir():
        return folder_fingerprint(role, Path(path))
    return {role: digest(Path(path))}


def folder_fingerprint(role: str, folder: Path) -> dict[str, str]:
    listing = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return {role: hashlib.sha256(canonical(listing).encode()).hexdigest()}


def digits_file() -> Path:
    """Where scikit-learn keeps its digits, found without importing it."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
