"""An artifact's manifest: its files with size and digest, and where the artifact came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict

MANIFEST = "manifest.json"
PIECE = 2**20  # bytes
CPU = "cpu"  # as the device of what was done
DIFFERS = "is not what was committed (SHA-256 differs)"


class RottenArtifact(Exception):
    """An artifact's file is missing, or is not what its manifest says."""

    def __init__(self, key: str, file: str, problem: str) -> None:
        super().__init__(key, file, problem)  # all three, so that it survives pickling
        self.key, self.file, self.problem = key, file, problem

    def __str__(self) -> str:
        return f"artifact {self.key[:12]}: {self.file}: {self.problem}"


def _below(name: str) -> str:
    """A file's name within its artifact, wherever the manifest came from."""
    if not name.isprintable() or name != str(PurePosixPath(name)) or name[:1] in "/." or ".." in name.split("/"):
        raise ValueError("no name of a file in an artifact")
    return name


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    size: int
    sha256: str

    def differs(self, path: Path) -> str | None:
        """What is found at a local path where it is not this file."""
        try:
            with path.open("rb") as file:
                return self.differs_from(file)
        except FileNotFoundError:
            return "missing"

    def differs_from(self, file: BinaryIO) -> str | None:
        """What is found in an open file where it is not this one."""
        size, sha256 = measure(file)
        if size != self.size:
            return f"{size} bytes, {self.size} were committed"
        return None if sha256 == self.sha256 else DIFFERS


class WorkDone(BaseModel):
    """How much a step did and on what, from which later runs estimate what a like one takes."""

    model_config = ConfigDict(frozen=True)
    flops: float | None  # of its own, by formula; None where there is no formula
    shared_flops: float = 0.0  # of a pass that it can have shared with steps of its kind
    device: str  # "cpu", or the model of its GPUs
    devices: float  # that it had at once; shares of a GPU count as such
    workers: int
    precision: str  # of its products


class Origin(BaseModel):
    """Where an artifact came from; nothing in it is part of the key."""

    model_config = ConfigDict(frozen=True)
    step: str
    run: str
    seconds: float
    made: str
    git_commit: str | None = None
    work: WorkDone | None = None  # artifacts of earlier versions have none


class Manifest(BaseModel):
    """What an artifact holds, what identifies it and who made it."""

    model_config = ConfigDict(frozen=True)
    key: str
    identity: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_below)], FileEntry]
    origin: Origin

    def sealed(self) -> str:
        """The document that is stored: it carries a digest of all that it says."""
        told = self.model_dump(mode="json")
        return json.dumps(told | {"seal": _seal(told)}, indent=1, ensure_ascii=False)

    @classmethod
    def unsealed(cls, content: bytes) -> Manifest:
        """Read a stored manifest. Raise ValueError, with the reason, if it is unreadable or not what was written."""
        try:
            document = json.loads(content)
            seal = document.pop("seal", None)
            manifest = cls.model_validate(document)
        except (ValueError, AttributeError):
            raise ValueError("cannot be read") from None
        if seal is not None and seal != _seal(document):
            raise ValueError(DIFFERS)
        return manifest


def _seal(document: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return measure(file)[1]


def measure(file: BinaryIO) -> tuple[int, str]:
    """Size and SHA-256 of what is left of an open file, read in pieces."""
    size, sha256 = 0, hashlib.sha256()
    while piece := file.read(PIECE):
        size += len(piece)
        sha256.update(piece)
    return size, sha256.hexdigest()


def canonical(value: Any) -> str:
    """JSON in one form only: sorted names, no spaces, shortest floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
