"""Files under one URL, on this machine or over a network: what the store is built on.

A file appears whole or not at all, whatever is killed; nothing relies on renaming over a network, or on the order of a
listing, and no listing is kept. What fails in passing (an overloaded server, a timeout, a connection that breaks) is
tried again for a while; what does not pass (no such bucket, no permission, a full disk) is told at once, in one line.

Where the server is and who may use it are looked up where each library looks: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
the like, or fsspec's configuration. They are never in a URL.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from graftwork.specs.paths import UnknownInPath, expand
from graftwork.specs.secrets import filled

T = TypeVar("T")

RETRY_SECONDS = 60.0  # from an operation's first failure to the last try
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between tries: doubled each time, and a random share of it
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # seconds
REQUEST_TRIES = 2  # of one request: a part that is lost does not cost the whole file
PART_BYTES = 8 * 2**20  # large files go in parts of this size,
PARTS_AT_ONCE = 4  # so many at a time
DRAFTS = ".drafts"  # files that are being written, in a local store

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
PASSING = {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO}
SIGNS_OF_FULL = ("No space left on device", "Disk quota exceeded", "disk is full")
FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"}
PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}


class StoreError(OSError):
    """A store that cannot be read or written: its URL, what was found and what to do, in one line."""

    def __init__(self, url: str, problem: str, remedy: str) -> None:
        super().__init__(f"store: got {url!r}, {problem}; {remedy}")
        self.url, self.problem, self.remedy = url, problem, remedy

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str, str]]:
        return StoreError, (self.url, self.problem, self.remedy)


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


def open_files(url: str) -> Files:
    """The files at a folder or an fsspec URL; raises StoreError where no installed library knows it."""
    protocol = url.partition("://")[0] if "://" in url else ""
    try:
        place = filled(expand(url), "store")
        if "://" not in place and "::" not in place:
            # A relative path means the same folder in every process of a job.
            return LocalFiles(str(Path(place).absolute()))
        import fsspec  # which takes longer to load than a run on a local store that has all of its steps
        from fsspec.implementations.local import LocalFileSystem

        if protocol in ("s3", "s3a"):
            fs, root = _open_s3(place)
            if not root:
                raise ValueError("no bucket in it")
            return RemoteFiles(fs, root, url)
        fs, root = fsspec.core.url_to_fs(place)
        if isinstance(fs, LocalFileSystem):
            return LocalFiles(str(root))
        fs, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except ImportError as missing:
        package = "graftwork[s3]" if protocol in ("s3", "s3a") else protocol
        told = f"accepted: a folder, or the URL of a library that is installed ({package!r} may want installing)"
        raise StoreError(url, f"whose library is not installed ({missing})", told) from None
    except UnknownInPath as unknown:
        raise StoreError(url, "which cannot be understood", f"accepted: {unknown}") from None
    except (ValueError, RuntimeError) as unknown:
        raise StoreError(
            url, f"which cannot be understood ({unknown})", "accepted: a folder, or a URL as s3://bucket/prefix"
        ) from None
    return RemoteFiles(fs, root, url)


def _open_s3(url: str) -> tuple[Any, str]:
    import fsspec

    once = {"mode": "standard", "total_max_attempts": REQUEST_TRIES}
    ours = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": once}
    fs, root = fsspec.core.url_to_fs(
        url,
        use_listings_cache=False,
        default_block_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        config_kwargs=ours | fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
    )
    fs.retries = 1  # what to try again is decided in one place, below
    return fs, root


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
        found = {}
        for path in base.rglob("*"):
            with suppress(FileNotFoundError):  # gone since
                stat = path.stat()
                if path.is_file():
                    found[path.relative_to(base).as_posix()] = FileInfo(stat.st_size, stat.st_mtime)
        return found

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


class RemoteFiles(Files):
    """Files behind any fsspec implementation. A file that is uploaded is there when the upload has ended."""

    local = False

    def __init__(self, fs: Any, root: str, url: str) -> None:
        super().__init__(root, url)
        self.fs = fs
        self.is_s3 = "s3" in fs.protocol
        self.in_parts = {"chunksize": PART_BYTES} if self.is_s3 else {}
        self.at_once = {"max_concurrency": 1} if self.is_s3 else {}  # it would ask for the size first

    def read(self, name: str) -> bytes:
        content: bytes = self._try("read", name, lambda: self.fs.cat_file(self.at(name), **self.at_once))
        return content

    def write(self, name: str, content: bytes) -> None:
        self._try("write", name, lambda: self.fs.pipe_file(self.at(name), content))

    def create(self, name: str, content: bytes) -> bool:
        def work() -> bool:
            try:
                self.fs.pipe_file(self.at(name), content, mode="create")
            except OSError as error:
                if not isinstance(error, FileExistsError) and _code(error) != "PreconditionFailed":
                    raise
                # It may be our own: the answer to an earlier try was lost.
                return bool(self.fs.cat_file(self.at(name), **self.at_once) == content)
            return True

        try:
            return self._try("create", name, work)
        except FileNotFoundError:  # there was one, and it went before it was read
            return False

    def put(self, path: Path, name: str) -> None:
        self._try("upload", name, lambda: self.fs.put_file(str(path), self.at(name), **self.in_parts))
        path.unlink()

    def get(self, name: str, path: Path) -> None:
        self._try("download", name, lambda: self.fs.get_file(self.at(name), str(path)))

    def move(self, name: str, to: str) -> None:
        self._try("copy", name, lambda: self.fs.cp_file(self.at(name), self.at(to)))
        self.remove(name)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._try("remove", name, lambda: self.fs.rm_file(self.at(name)))

    def remove_tree(self, folder: str) -> None:
        for name in self.tree(folder):
            self.remove(f"{folder}/{name}")

    def names(self, folder: str) -> list[str]:
        try:
            found = self._try("list", folder, lambda: self.fs.ls(self.at(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {PurePosixPath(path).relative_to(self._base(folder)).as_posix() for path in found}
        return sorted(names - {"."})

    def tree(self, folder: str) -> dict[str, FileInfo]:
        found = self._try("list", folder, lambda: self.fs.find(self.at(folder), detail=True))
        return {
            PurePosixPath(path).relative_to(self._base(folder)).as_posix(): FileInfo(info["size"] or 0, _time(info))
            for path, info in found.items()
        }

    def through(self, name: str, work: Callable[[BinaryIO], T]) -> T:
        def opened() -> T:
            with self.fs.open(self.at(name), "rb", block_size=PART_BYTES, cache_type="readahead") as file:
                return work(file)

        return self._try("read", name, opened)

    def drafts(self) -> None:
        return None

    def uploads(self) -> dict[str, FileInfo]:
        found: dict[str, FileInfo] = {}
        for upload in self._uploads(""):
            name = PurePosixPath(upload["Key"]).relative_to(PurePosixPath(self._bucket_and_key("")[1])).as_posix()
            found[name] = FileInfo(self._uploaded(upload), upload["Initiated"].timestamp())
        return found

    def abort(self, name: str) -> None:
        for upload in self._uploads(name):
            self._s3("abort_multipart_upload", name, Key=upload["Key"], UploadId=upload["UploadId"])

    def _uploads(self, name: str) -> list[dict[str, Any]]:
        """Of all names that begin so."""
        if not self.is_s3:
            return []
        answer = self._s3("list_multipart_uploads", name, Prefix=self._bucket_and_key(name)[1])
        return list(answer.get("Uploads", ()))

    def _uploaded(self, upload: dict[str, Any]) -> int:
        answer = self._s3("list_parts", "", Key=upload["Key"], UploadId=upload["UploadId"])
        return sum(part["Size"] for part in answer.get("Parts", ()))

    def _s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        bucket, _ = self._bucket_and_key(name)
        return self._try(method, name, lambda: self.fs.call_s3(method, Bucket=bucket, **arguments))

    def _bucket_and_key(self, name: str) -> tuple[str, str]:
        bucket, key, _ = self.fs.split_path(self.at(name))
        return bucket, key

    def _base(self, folder: str) -> str:
        return str(self.fs._strip_protocol(self.at(folder)))

    def _try(self, doing: str, name: str, work: Callable[[], T]) -> T:
        """Do it, again and again while it fails in passing; raises StoreError."""
        from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

        failed: list[float] = []  # when

        def too_late(state: RetryCallState) -> bool:
            failed.append(time.monotonic())
            most = RETRY_SECONDS if self.retry_seconds is None else self.retry_seconds
            return failed[-1] - failed[0] >= most

        wait = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        try:
            return Retrying(retry=retry_if_exception(_passes), stop=too_late, wait=wait)(work)
        except RetryError as error:
            cause = error.last_attempt.exception()
            assert cause is not None
            tried = f"{doing} of {name} failed {len(failed)} times, the last time with {_line(cause)}"
            remedy = "try again when it does, or resume"
            raise StoreError(self.url, f"which does not answer as it should: {tried}", remedy) from cause
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            if _code(error) == "NoSuchBucket":
                raise explained(self.url, error) from error
            raise
        except Exception as error:  # of whatever kind the library has
            raise explained(self.url, error) from error


def _unless_gone(_: object, __: str, error: tuple[Any, BaseException, Any]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def told_by(url: str, error: BaseException) -> StoreError | None:
    """What an error says of the store: that it is full, may not be written or does not answer; None otherwise."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, OSError) and (
        error.errno in FULL or (error.errno in CLOSED and str(error.filename).startswith(url))
    ):
        return explained(url, error)
    short = isinstance(error, OSError) and error.errno is None and "requested and" in str(error)  # numpy's
    if short or any(sign in str(error) for sign in SIGNS_OF_FULL):  # libraries that write files in their own way
        return explained(url, OSError(errno.ENOSPC, _line(error)))
    return None


def explained(url: str, error: BaseException) -> StoreError:
    """An error of a store in one line that says what to do."""
    number = error.errno if isinstance(error, OSError) else None
    told = _line(error)
    if isinstance(error, OSError) and error.strerror and not _response(error):
        told = error.strerror + (f": {error.filename}" if error.filename else "")
    if number in FULL or _code(error) in FULL_CODES or _status(error) == 507:
        return StoreError(url, f"where there is no room ({told})", "free room there, then resume")
    if _code(error) == "NoSuchBucket":
        return StoreError(url, "whose bucket does not exist", "accepted: a bucket that exists")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        accepted = "accepted: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile"
        return StoreError(url, "for which there are no credentials", accepted)
    if isinstance(error, PermissionError) or number in CLOSED:
        return StoreError(url, f"which cannot be written: {told}", "accepted: a place that you may write; then resume")
    return StoreError(url, f"which cannot be written: {told}", "accepted: a writable path")


def _passes(error: BaseException) -> bool:
    """Whether the same again may succeed."""
    if _code(error) == "NoSuchUpload":  # it had ended, and the answer was lost
        return True
    if isinstance(error, StoreError | FileNotFoundError | FileExistsError | PermissionError):
        return False
    status = _status(error)
    if status is not None:
        return status in PASSING_STATUS or _code(error) in ("SlowDown", "RequestTimeout", "Throttling")
    passing: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError)
    if "aiohttp" in sys.modules:
        from aiohttp import ClientError

        passing += (ClientError,)
    if "botocore" in sys.modules:
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        passing += (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
        passing += (ResponseParserError,)  # an answer that was cut short
    return isinstance(error, passing) or (isinstance(error, OSError) and error.errno in PASSING)


def _response(error: BaseException | None) -> dict[str, Any]:
    """What an S3 server answered, from the error or what caused it."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def _status(error: BaseException) -> int | None:
    status: int | None = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _code(error: BaseException) -> str | None:
    code: str | None = _response(error).get("Error", {}).get("Code")
    return code


def _time(info: dict[str, Any]) -> float:
    """When a file was written, as far as its implementation says."""
    for field in ("LastModified", "mtime", "last_modified", "updated", "created"):
        when = info.get(field)
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, int | float):
            return float(when)
    return time.time()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
