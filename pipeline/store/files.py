"""Files under one URL, on this machine or over a network: what the store is built on.

A file appears whole or not at all, whatever is killed; nothing relies on renaming over a network, or on the order of a
listing, and no listing is kept. What fails in passing (an overloaded server, a timeout, a connection that breaks) is
tried again for a while; what does not pass (no such bucket, no permission, a full disk) is told at once, in one line.

Where the server is and who may use it are looked up where each library looks: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
the like, or fsspec's configuration. They are never in a URL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class FileInfo:
    """A stored file's size in bytes, and when it was last written, in seconds since the epoch."""

    size: int
    modified: float


class Files(ABC):
    """Files named by their path below `root`. What is missing is a FileNotFoundError; all else a StoreError."""

    local: bool
    fs: Any  # fsspec's file system
    retry_seconds: float | None = None  # instead of RETRY_SECONDS

    def __init__(self, root: str, url: str) -> None:
        self.root, self.url = PurePosixPath(root), url

    def at(self, name: str) -> str:
        return str(self.root / name)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole of a file."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Publish a small file; what was there is replaced."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Publish a small file that nobody else has written; False where there is one. `content` must be unique."""

    @abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Publish a local file, which is used up; what was there is replaced."""

    @abstractmethod
    def get(self, name: str, path: Path) -> None:
        """Copy a file to a local path."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name; over a network it has both for a moment."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; missing is fine."""

    @abstractmethod
    def remove_tree(self, folder: str) -> None:
        """Remove a folder and all below it, or a file; missing is fine."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """What is right below a folder, sorted."""

    @abstractmethod
    def tree(self, folder: str) -> dict[str, FileInfo]:
        """All files below a folder, by their path from there."""

    @abstractmethod
    def drafts(self) -> Path | None:
        """The local folder for files that will be `put`; None for any."""

    @abstractmethod
    def uploads(self) -> dict[str, FileInfo]:
        """Uploads that have begun and not ended, by name; a kill leaves them."""

    @abstractmethod
    def abort(self, name: str) -> None:
        """End the uploads of that name, which are lost."""

    @abstractmethod
    def through(self, name: str, work: Callable[[BinaryIO], T]) -> T:
        """What `work` makes of an open file; it may be called again from the start."""
