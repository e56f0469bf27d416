"""The store: artifacts named by their key, on any fsspec path.

    artifacts/<key>/manifest.json   and the files it lists, each with its size and SHA-256
    partial/<key>/                  checkpoints of a step that has not committed
    rotten/<key>-<time>/            what was found damaged, set aside
    runs/<run>.json                 what each run was asked for and came to
    outbox/<run>.jsonl              what MLflow was not there to be told

The manifest is written last, in one atomic move: without it the artifact does not exist. What is read is verified
against it first, so that nothing is served that is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"
State = Literal["cached", "partial", "pending"]


class RottenArtifact(Exception):
    """An artifact's file is missing, or is not what its manifest says."""

    def __init__(self, key: str, file: str, found: str) -> None:
        super().__init__(key, file, found)  # all three, so that it survives pickling
        self.key, self.file, self.found = key, file, found

    def __str__(self) -> str:
        return f"artifact {self.key[:12]}: {self.file}: {self.found}"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    size: int
    sha256: str


class Origin(BaseModel):
    """Where an artifact came from; nothing in it is part of the key."""

    model_config = ConfigDict(frozen=True)
    step: str
    run: str
    seconds: float
    made: str
    git_commit: str | None = None


class Manifest(BaseModel):
    """What an artifact holds, what identifies it and who made it."""

    model_config = ConfigDict(frozen=True)
    key: str
    identity: dict[str, Any]
    files: dict[str, FileEntry]
    origin: Origin


class Store:
    """Artifacts, partial work and run records under one fsspec path."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = PurePosixPath(root)
        self.local = isinstance(self.fs, LocalFileSystem)
        # A relative path means the same folder in every process of the job.
        self.url = str(root) if self.local else url

    # -- artifacts

    def manifest(self, key: str) -> Manifest | None:
        """The artifact's manifest; None where there is none, or none that can be read."""
        text = self._read(f"artifacts/{key}/{MANIFEST}")
        if text is None:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError:
            return None

    def manifests(self) -> Iterator[Manifest]:
        """Every committed artifact."""
        for key in self._names("artifacts"):
            manifest = self.manifest(key)
            if manifest is not None:
                yield manifest

    def state(self, key: str) -> State:
        if self.manifest(key) is not None:
            return "cached"
        return "partial" if [name for name in self._names(f"partial/{key}") if name != "out"] else "pending"

    def artifact(self, key: str) -> Artifact:
        return Artifact(self, key)

    def workplace(self, key: str) -> Path:
        """An empty local folder in which a step puts its files, to be committed from there."""
        if not self.local:
            return Path(tempfile.mkdtemp(prefix="graftwork-"))
        folder = Path(self.root / "partial" / key / "out")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, key: str, folder: Path, identity: dict[str, Any], origin: Origin) -> Manifest:
        """Move every file below `folder` into the artifact, the manifest last; partial work under the key goes."""
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            files[name] = FileEntry(size=path.stat().st_size, sha256=digest(path))
            self.put(path, f"artifacts/{key}/{name}")
        manifest = Manifest(key=key, identity=identity, files=files, origin=origin)
        self.write(f"artifacts/{key}/{MANIFEST}", manifest.model_dump_json(indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        self._remove(f"partial/{key}")
        return manifest

    def quarantine(self, key: str) -> str:
        """Set a damaged artifact aside; returns where. Its manifest goes first: from then on it does not exist."""
        aside = f"rotten/{key}-{time.time_ns()}"
        source = f"artifacts/{key}"
        names = [MANIFEST, *(name for name in self._tree(source) if name != MANIFEST)]
        for name in names:
            if self.fs.exists(self._at(f"{source}/{name}")):
                self.fs.makedirs(str(PurePosixPath(self._at(f"{aside}/{name}")).parent), exist_ok=True)
                self.fs.mv(self._at(f"{source}/{name}"), self._at(f"{aside}/{name}"))
        self._remove(source)
        return aside

    def partial(self, key: str) -> Partial:
        return Partial(self, key)

    # -- documents

    def read_run(self, run: str) -> str | None:
        return self._read(f"runs/{run}.json")

    def write_run(self, run: str, text: str) -> None:
        self.write(f"runs/{run}.json", text)

    def runs(self) -> list[str]:
        return sorted(name.removesuffix(".json") for name in self._names("runs") if name.endswith(".json"))

    # -- files

    def put(self, path: Path, name: str) -> None:
        """Publish a local file under `name`: it appears whole or not at all. The local one is used up."""
        target = self._at(name)
        if not self.local:
            self.fs.put_file(str(path), target)
            path.unlink()
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def write(self, name: str, text: str) -> None:
        """Publish a small document, on disk before it is visible."""
        if not self.local:
            self.fs.pipe_file(self._at(name), text.encode())
            return
        Path(self._at(name)).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=Path(self._at(name)).parent, delete=False) as draft:
            draft.write(text)
            draft.flush()
            os.fsync(draft.fileno())
        Path(draft.name).chmod(0o644)
        Path(draft.name).replace(self._at(name))

    def read(self, name: str) -> str | None:
        """A small document, or None."""
        return self._read(name)

    def get(self, name: str, path: Path) -> None:
        """Copy a stored file to a local path."""
        self.fs.get_file(self._at(name), str(path))

    def check_writable(self) -> None:
        """Raise OSError where nothing can be stored."""
        probe = f"runs/.probe-{os.getpid()}"
        self.write(probe, "")
        self.fs.rm_file(self._at(probe))

    def _at(self, name: str) -> str:
        return str(self.root / name)

    def _read(self, name: str) -> str | None:
        try:
            content: bytes = self.fs.cat_file(self._at(name))
            return content.decode()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(PurePosixPath(path).name for path in self.fs.ls(self._at(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _tree(self, folder: str) -> list[str]:
        base = PurePosixPath(self._at(folder))
        return [str(PurePosixPath(path).relative_to(base)) for path in self.fs.find(str(base))]

    def _remove(self, folder: str) -> None:
        if self.fs.exists(self._at(folder)):
            self.fs.rm(self._at(folder), recursive=True)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)


class Artifact:
    """A committed artifact, as a stage reads it: `path()` is a local folder whose files were verified first."""

    # Verified in this process already: key -> folder.
    _verified: ClassVar[dict[tuple[str, str], Path]] = {}

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def path(self) -> Path:
        """The artifact's files in a local folder; raises RottenArtifact where one is not what was committed."""
        known = self._verified.get((self.store.url, self.key))
        if known is not None:
            return known
        manifest = self.store.manifest(self.key)
        if manifest is None:
            raise RottenArtifact(self.key, MANIFEST, "missing or unreadable")
        folder = Path(self.store._at(f"artifacts/{self.key}")) if self.store.local else self._download(manifest)
        for name in manifest.files:
            self._verify(manifest, name, folder / name)
        self._verified[self.store.url, self.key] = folder
        return folder

    def read(self, name: str) -> bytes:
        """One verified file of the artifact, without fetching the others."""
        manifest = self.store.manifest(self.key)
        if manifest is None or name not in manifest.files:
            raise RottenArtifact(self.key, name, "missing")
        try:
            content = self.store.fs.cat_file(self.store._at(f"artifacts/{self.key}/{name}"))
        except FileNotFoundError:
            raise RottenArtifact(self.key, name, "missing") from None
        if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
            raise RottenArtifact(self.key, name, "is not what was committed (SHA-256 differs)")
        return content

    def verify(self) -> None:
        """Read every file and compare it with the manifest, whatever was verified before."""
        self._verified.pop((self.store.url, self.key), None)
        if not self.store.local:  # a copy on this machine says nothing of the store
            shutil.rmtree(self._cache(), ignore_errors=True)
        self.path()

    def _verify(self, manifest: Manifest, name: str, path: Path) -> None:
        entry = manifest.files[name]
        if not path.exists():
            raise RottenArtifact(self.key, name, "missing")
        if path.stat().st_size != entry.size:
            raise RottenArtifact(self.key, name, f"{path.stat().st_size} bytes, {entry.size} were committed")
        if digest(path) != entry.sha256:
            raise RottenArtifact(self.key, name, "is not what was committed (SHA-256 differs)")

    def _cache(self) -> Path:
        """Where a remote artifact's files are kept on this machine."""
        return Path(tempfile.gettempdir()) / "graftwork-cache" / self.key

    def _download(self, manifest: Manifest) -> Path:
        folder = self._cache()
        for name, entry in manifest.files.items():
            path = folder / name
            if path.exists() and path.stat().st_size == entry.size and digest(path) == entry.sha256:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                self.store.get(f"artifacts/{self.key}/{name}", draft)
            except FileNotFoundError:
                raise RottenArtifact(self.key, name, "missing") from None
            draft.replace(path)
        return folder

    def __reduce__(self) -> tuple[type[Artifact], tuple[Store, str]]:
        return Artifact, (self.store, self.key)


class Partial:
    """Work that a step has saved but not committed: files that replace each other whole."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Have `write` make a local file, then publish it under `name`; what was there is replaced in one move."""
        with tempfile.TemporaryDirectory(dir=self._drafts()) as folder:
            draft = Path(folder) / "draft"
            write(draft)
            self.store.put(draft, f"partial/{self.key}/{name}")

    def load(self, name: str) -> Path | None:
        """A local copy of a saved file, or None."""
        if self.store.local:
            path = Path(self.store._at(f"partial/{self.key}/{name}"))
            return path if path.exists() else None
        path = Path(tempfile.mkdtemp(prefix="graftwork-")) / name
        try:
            self.store.get(f"partial/{self.key}/{name}", path)
        except FileNotFoundError:
            return None
        return path

    def _drafts(self) -> str | None:
        """On a local store, drafts lie beside it: a move between file systems would not be atomic."""
        if not self.store.local:
            return None
        folder = Path(self.store._at("partial/.drafts"))
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def __reduce__(self) -> tuple[type[Partial], tuple[Store, str]]:
        return Partial, (self.store, self.key)


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """JSON in one form only: sorted names, no spaces, shortest floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
