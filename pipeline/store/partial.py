"""Partial work of a step: checkpoints that live beside the store's artifacts until the step commits."""

from __future__ import annotations

import fcntl
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from graftwork.pipeline.store.manifest import FileEntry, digest

if TYPE_CHECKING:
    from graftwork.pipeline.store.artifacts import Store

POINTER = ".json"  # of a save of partial work: partial/<key>/<name>.json


class Pointer(FileEntry):
    """Which file holds what was saved last."""

    file: str


class Partial:
    """Work that a step has saved but not committed.

    `partial/<key>/<name>.json` is the pointer to the last save: it moves, in one write, when the data is there whole.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Have `write` make a local file, then publish it under `name`; what was there is replaced at once."""
        data = f"{name}.{uuid.uuid4().hex[:12]}"
        with tempfile.TemporaryDirectory(dir=self.store.files.drafts()) as folder:
            draft = Path(folder) / "draft"
            write(draft)
            pointer = Pointer(file=data, size=draft.stat().st_size, sha256=digest(draft))
            self.store.files.put(draft, self._at(data))
        self.store.write(self._at(name + POINTER), pointer.model_dump_json())
        for other in self._saves(name):
            if other != data:
                self.store.remove(self._at(other))

    def load(self, name: str) -> Path | None:
        """A verified local copy of the last save; None where there is none, or none that is whole: that is removed."""
        while (text := self.store.read(self._at(name + POINTER))) is not None:
            try:
                pointer = Pointer.model_validate_json(text)
            except ValidationError:
                break
            path = self._copy(name, pointer)
            if path is not None:
                return path
            if self.store.read(self._at(name + POINTER)) == text:  # it was not saved anew in the meantime
                break
        else:
            return None
        self._forget(name)
        return None

    def _copy(self, name: str, pointer: Pointer) -> Path | None:
        if self.store.local:
            path = Path(self.store.root / self._at(pointer.file))
            return path if pointer.differs(path) is None else None
        folder = self.store.cache() / self._at(name)
        for other in folder.glob("*"):
            if other.name != pointer.file and not other.name.startswith("."):
                other.unlink(missing_ok=True)
        path = folder / pointer.file
        with _alone(folder):  # a training's workers on one machine: the first one fetches, the others find it
            if not path.is_file():
                return path if self.store.fetch(self._at(pointer.file), pointer, path) is None else None
        if pointer.differs(path) is None:  # all at once, which takes long for a large file
            return path
        with _alone(folder):
            return path if self.store.fetch(self._at(pointer.file), pointer, path) is None else None

    def _forget(self, name: str) -> None:
        self.store.remove(self._at(name + POINTER))
        for data in self._saves(name):
            self.store.remove(self._at(data))

    def _saves(self, name: str) -> list[str]:
        """The data files of saves under `name`, the last one and those that a kill left."""
        files = self.store.names(f"partial/{self.key}")
        return [file for file in files if file.startswith(f"{name}.") and file != name + POINTER]

    def _at(self, name: str) -> str:
        return f"partial/{self.key}/{name}"

    def __reduce__(self) -> tuple[type[Partial], tuple[Store, str]]:
        return Partial, (self.store, self.key)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in such a context of the folder; a killed one is out of it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
