"""Files behind a network, through fsspec, with retries."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from graftwork.pipeline.store.errors import StoreError, code_of, explained, one_line, status_of
from graftwork.pipeline.store.files import FileInfo, Files

T = TypeVar("T")

RETRY_SECONDS = 60.0  # from an operation's first failure to the last try
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between tries: doubled each time, and a random share of it
PART_BYTES = 8 * 2**20  # large files go in parts of this size,
PARTS_AT_ONCE = 4  # so many at a time
PASSING = {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO}
PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}


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
                if not isinstance(error, FileExistsError) and code_of(error) != "PreconditionFailed":
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
        uploads: dict[str, FileInfo] = {}
        for upload in self._uploads(""):
            name = PurePosixPath(upload["Key"]).relative_to(PurePosixPath(self._bucket_and_key("")[1])).as_posix()
            uploads[name] = FileInfo(self._uploaded(upload), upload["Initiated"].timestamp())
        return uploads

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
            tried = f"{doing} of {name} failed {len(failed)} times, the last time with {one_line(cause)}"
            remedy = "try again when it does, or resume"
            raise StoreError(self.url, f"which does not answer as it should: {tried}", remedy) from cause
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            if code_of(error) == "NoSuchBucket":
                raise explained(self.url, error) from error
            raise
        except Exception as error:  # of whatever kind the library has
            raise explained(self.url, error) from error


def _passes(error: BaseException) -> bool:
    """Whether the same again may succeed."""
    if code_of(error) == "NoSuchUpload":  # it had ended, and the answer was lost
        return True
    if isinstance(error, StoreError | FileNotFoundError | FileExistsError | PermissionError):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS or code_of(error) in ("SlowDown", "RequestTimeout", "Throttling")
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


def _time(info: dict[str, Any]) -> float:
    """When a file was written, as far as its implementation says."""
    for field in ("LastModified", "mtime", "last_modified", "updated", "created"):
        when = info.get(field)
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, int | float):
            return float(when)
    return time.time()
