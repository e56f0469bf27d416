"""Errors of a store, and the line that explains each."""

from __future__ import annotations

import errno
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
SIGNS_OF_FULL = ("No space left on device", "Disk quota exceeded", "disk is full")
FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"}


class StoreError(OSError):
    """A store that cannot be read or written: its URL, what was found and what to do, in one line."""

    def __init__(self, url: str, problem: str, remedy: str) -> None:
        super().__init__(f"store: got {url!r}, {problem}; {remedy}")
        self.url, self.problem, self.remedy = url, problem, remedy

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str, str]]:
        return StoreError, (self.url, self.problem, self.remedy)


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
        return explained(url, OSError(errno.ENOSPC, one_line(error)))
    return None


def explained(url: str, error: BaseException) -> StoreError:
    """Return a store's error as one line that says what to do."""
    number = error.errno if isinstance(error, OSError) else None
    reason = one_line(error)
    if isinstance(error, OSError) and error.strerror and not _response(error):
        reason = error.strerror + (f": {error.filename}" if error.filename else "")
    if number in FULL or code_of(error) in FULL_CODES or status_of(error) == 507:
        return StoreError(url, f"where there is no room ({reason})", "free room there, then resume")
    if code_of(error) == "NoSuchBucket":
        return StoreError(url, "whose bucket does not exist", "accepted: a bucket that exists")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        accepted = "accepted: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile"
        return StoreError(url, "for which there are no credentials", accepted)
    if isinstance(error, PermissionError) or number in CLOSED:
        return StoreError(
            url, f"which cannot be written: {reason}", "accepted: a place that you may write; then resume"
        )
    return StoreError(url, f"which cannot be written: {reason}", "accepted: a writable path")


def _response(error: BaseException | None) -> dict[str, Any]:
    """What an S3 server answered, from the error or what caused it."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def status_of(error: BaseException) -> int | None:
    status: int | None = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def code_of(error: BaseException) -> str | None:
    code: str | None = _response(error).get("Error", {}).get("Code")
    return code


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
