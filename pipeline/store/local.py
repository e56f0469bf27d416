"""Files in a folder of this machine."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from graftwork.pipeline.store.errors import StoreError, explained
from graftwork.pipeline.store.files import FileInfo, Files, T

DRAFTS = ".drafts"  # files that are being written, in a local store
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalFiles(Files):
    """A folder. Files are written under `.drafts` in it, and moved to their place."""

    local = True

    def __init__(self, root: str) -> None:
        super().__init__(root, root)

    @cached_property
    def fs(self) -> Any:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem()

    def read(self, name: str) -> bytes:
        with self._problems():
            try:
                return Path(self.at(name)).read_bytes()
            except NotADirectoryError:
                raise FileNotFoundError(name) from None

    def write(self, name: str, content: bytes) -> None:
        with self._problems(), self._draft(content) as draft:
            draft.replace(self._place(name))

    def create(self, name: str, content: bytes) -> bool:
        with self._problems(), self._draft(content) as draft:
            place = self._place(name)
            try:
                os.link(draft, place)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return self._create_here(name, content)
            return True

    def put(self, path: Path, name: str) -> None:
        with self._problems():
            path.replace(self._place(name))

    def get(self, name: str, path: Path) -> None:
        with self._problems():
            shutil.copyfile(self.at(name), path)

    def move(self, name: str, to: str) -> None:
        with self._problems():
            Path(self.at(name)).replace(self._place(to))

    def remove(self, name: str) -> None:
        with self._problems(), suppress(NotADirectoryError):
            Path(self.at(name)).unlink(missing_ok=True)

    def remove_tree(self, folder: str) -> None:
        with self._problems(), suppress(FileNotFoundError, NotADirectoryError):
            path = Path(self.at(folder))
            shutil.rmtree(path, onerror=_unless_gone) if path.is_dir() else path.unlink()

    def names(self, folder: str) -> list[str]:
        with self._problems():
            try:
                return sorted(path.name for path in Path(self.at(folder)).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def tree(self, folder: str) -> dict[str, FileInfo]:
        base = Path(self.at(folder))
        files = {}
        for path in base.rglob("*"):
            with suppress(FileNotFoundError):  # gone since
                stat = path.stat()
                if path.is_file():
                    files[path.relative_to(base).as_posix()] = FileInfo(stat.st_size, stat.st_mtime)
        return files

    def through(self, name: str, work: Callable[[BinaryIO], T]) -> T:
        with self._problems(), Path(self.at(name)).open("rb") as file:
            return work(file)

    def drafts(self) -> Path:
        """On the same file system, so that they can be moved."""
        folder = Path(self.at(DRAFTS))
        with self._problems():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def uploads(self) -> dict[str, FileInfo]:
        return {}  # drafts are files like others

    def abort(self, name: str) -> None:
        pass

    def _create_here(self, name: str, content: bytes) -> bool:
        """Where the file system has no links: who reads it at once may see a part of it."""
        try:
            with Path(self.at(name)).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _place(self, name: str) -> Path:
        path = Path(self.at(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _draft(self, content: bytes) -> Iterator[Path]:
        """A file on disk with this content, gone afterwards unless it was moved."""
        with tempfile.NamedTemporaryFile(dir=self.drafts(), delete=False) as file:
            draft = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                draft.chmod(0o644)
                yield draft
            finally:
                draft.unlink(missing_ok=True)

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except OSError as error:
            raise explained(self.url, error) from error


def _unless_gone(_: object, __: str, error: tuple[Any, BaseException, Any]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
