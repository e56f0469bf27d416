"""The store: artifacts named by their key, on any fsspec path.

    artifacts/<key>/manifest.json   and the files it lists, each with its size and SHA-256
    partial/<key>/                  checkpoints of a step that has not committed: data, and a pointer to the last
    rotten/<key>-<time>/            what was found damaged, set aside
    runs/<run>.json                 what each run was asked for and came to
    outbox/<run>.jsonl              what MLflow was not there to be told
    contents/<place>                what files outside hold, as far as it is known

The manifest is written last, whole or not at all: without it the artifact does not exist. What is read is verified
against it first, so that nothing is served that is not whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from graftwork.pipeline.store.errors import StoreError, told_by
from graftwork.pipeline.store.manifest import DIFFERS, MANIFEST, FileEntry, Manifest, Origin, RottenArtifact, digest
from graftwork.pipeline.store.open import open_files
from graftwork.pipeline.store.partial import POINTER, Partial

READERS = 16  # manifests asked for at once, over a network
State = Literal["cached", "partial", "pending"]


class Store:
    """Artifacts, partial work and run records under one fsspec path; raises StoreError where it cannot be used."""

    def __init__(self, url: str) -> None:
        self.files = open_files(url)
        self.url, self.root, self.local = self.files.url, self.files.root, self.files.local

    @property
    def fs(self) -> Any:
        """The file system that it lies on, as fsspec knows it."""
        return self.files.fs

    # -- artifacts

    def manifest(self, key: str) -> Manifest | None:
        """The artifact's manifest; None where there is none, or none that can be read."""
        try:
            return self.sound_manifest(key)
        except RottenArtifact:
            return None

    def sound_manifest(self, key: str) -> Manifest | None:
        """The artifact's manifest; None where there is none. Raises RottenArtifact where it cannot be read."""
        try:
            manifest = Manifest.unsealed(self.files.read(f"artifacts/{key}/{MANIFEST}"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RottenArtifact(key, MANIFEST, str(error)) from None
        if manifest.key != key:
            raise RottenArtifact(key, MANIFEST, f"is that of {manifest.key[:12]}")
        return manifest

    def keys(self) -> list[str]:
        """Every key under which there are files, be it an artifact or not."""
        return self.names("artifacts")

    def manifests(self) -> Iterator[Manifest]:
        """Every committed artifact."""
        for key in self.keys():
            manifest = self.manifest(key)
            if manifest is not None:
                yield manifest

    def known(self, keys: Collection[str]) -> dict[str, Manifest]:
        """Return the manifests of those keys that have one. Over a network, read many at once."""
        if self.local:
            manifests = [self.manifest(key) for key in keys]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                manifests = list(pool.map(self.manifest, keys))
        return {manifest.key: manifest for manifest in manifests if manifest is not None}

    def states(self, keys: Collection[str]) -> dict[str, State]:
        """The state of each of many keys."""
        known, begun = self.known(keys), set(self.names("partial"))
        return {key: "cached" if key in known else self.state(key) if key in begun else "pending" for key in keys}

    def state(self, key: str) -> State:
        if self.manifest(key) is not None:
            return "cached"
        return "partial" if any(name.endswith(POINTER) for name in self.names(f"partial/{key}")) else "pending"

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
            self.files.put(path, f"artifacts/{key}/{name}")
        manifest = Manifest(key=key, identity=identity, files=files, origin=origin)
        self.write(f"artifacts/{key}/{MANIFEST}", manifest.sealed())
        shutil.rmtree(folder, ignore_errors=True)
        self.files.remove_tree(f"partial/{key}")
        return manifest

    def quarantine(self, key: str) -> str:
        """Set a damaged artifact aside; returns where. Its manifest goes first: from then on it does not exist."""
        source, aside = f"artifacts/{key}", f"rotten/{key}-{time.time_ns()}"
        for name in [MANIFEST, *(name for name in self.files.tree(source) if name != MANIFEST)]:
            with suppress(FileNotFoundError):  # another was faster, or it is what is missing
                self.files.move(f"{source}/{name}", f"{aside}/{name}")
        self.files.remove_tree(source)
        return aside

    def partial(self, key: str) -> Partial:
        return Partial(self, key)

    # -- documents

    def read(self, name: str) -> str | None:
        """A small document; None where there is none, or none that is text."""
        try:
            return self.files.read(name).decode()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None

    def write(self, name: str, text: str) -> None:
        """Publish a small document, whole; what was there is replaced."""
        self.files.write(name, text.encode())

    def create(self, name: str, text: str) -> bool:
        """Publish a small document, whole, if there is none of that name; False if there is. `text` must be unique."""
        return self.files.create(name, text.encode())

    def remove(self, name: str) -> None:
        """Remove a document; missing is fine."""
        self.files.remove(name)

    def names(self, folder: str) -> list[str]:
        """What is right below a folder, as it is now; nothing where there is no folder."""
        return self.files.names(folder)

    def read_run(self, run: str) -> str | None:
        return self.read(f"runs/{run}.json")

    def write_run(self, run: str, text: str) -> None:
        self.write(f"runs/{run}.json", text)

    def runs(self) -> list[str]:
        return sorted(name.removesuffix(".json") for name in self.names("runs") if name.endswith(".json"))

    def exists(self) -> bool:
        """Return whether there is a store; over a network there is no telling, and nothing to make."""
        return not self.local or Path(self.root).is_dir()

    def check_writable(self) -> None:
        """Raise StoreError where nothing can be stored."""
        probe = f"runs/.probe-{uuid.uuid4().hex}"
        self.write(probe, " " * 4096)  # an empty file would find room on a full disk
        self.remove(probe)

    def explain(self, error: BaseException) -> StoreError | None:
        """What an error of a step's work or commit says of the store; None where it says nothing of it."""
        return told_by(self.url, error)

    def cache(self) -> Path:
        """Where this machine keeps copies of a remote store's files."""
        place = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"graftwork-cache-{os.getuid()}" / place

    def fetch(self, name: str, entry: FileEntry, path: Path) -> str | None:
        """Make a verified copy at a local path. Return how the stored file differs from the manifest, or None.

        Several processes may do so at once: each writes its own draft. A damaged copy is fetched again.
        """
        if path.is_file() and entry.differs(path) is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self.files.get(name, draft)
            difference = entry.differs(draft)
            if difference is None:
                draft.replace(path)
        except FileNotFoundError:
            return "missing"
        finally:
            draft.unlink(missing_ok=True)
        return difference

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)


class Artifact:
    """A committed artifact, as a stage reads it: `path()` is a local folder whose files were verified first."""

    # Verified in this process already, with this manifest.
    _verified: ClassVar[dict[tuple[str, str], Manifest]] = {}

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def path(self) -> Path:
        """The artifact's files in a local folder; raises RottenArtifact where one is not what was committed."""
        manifest = self._manifest()
        folder = self.store.root / "artifacts" / self.key if self.store.local else self.store.cache() / self.key
        folder = Path(folder)
        known = self._verified.get((self.store.url, self.key)) == manifest
        for name, entry in manifest.files.items():
            path = folder / name
            if not (known and path.exists()):
                self._check(name, entry, path)
        self._verified[self.store.url, self.key] = manifest
        return folder

    def read(self, name: str) -> bytes:
        """One verified file of the artifact, without fetching the others."""
        manifest = self._manifest()
        if name not in manifest.files:
            raise RottenArtifact(self.key, name, "missing")
        try:
            content = self.store.files.read(f"artifacts/{self.key}/{name}")
        except FileNotFoundError:
            raise RottenArtifact(self.key, name, "missing") from None
        if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
            raise RottenArtifact(self.key, name, DIFFERS)
        return content

    def verify(self) -> None:
        """Read every file in the store and compare it with the manifest, whatever was verified before."""
        for name, entry in self._manifest().files.items():
            try:
                difference = self.store.files.through(f"artifacts/{self.key}/{name}", entry.differs_from)
            except FileNotFoundError:
                difference = "missing"
            if difference is not None:
                raise RottenArtifact(self.key, name, difference)

    def _manifest(self) -> Manifest:
        manifest = self.store.sound_manifest(self.key)
        if manifest is None:
            raise RottenArtifact(self.key, MANIFEST, "missing")
        return manifest

    def _check(self, name: str, entry: FileEntry, path: Path) -> None:
        if self.store.local:
            difference = entry.differs(path)
        else:
            difference = self.store.fetch(f"artifacts/{self.key}/{name}", entry, path)
        if difference is not None:
            raise RottenArtifact(self.key, name, difference)

    def __reduce__(self) -> tuple[type[Artifact], tuple[Store, str]]:
        return Artifact, (self.store, self.key)
