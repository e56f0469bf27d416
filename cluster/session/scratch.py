"""The folder for the files of a Ray of our own. Unix sockets are among them, whose paths may not be long."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graftwork.specs.problems import SpecError

PREFIX = "graft-"
OWNER = "owner.lock"  # locked as long as the driver lives whose folder it is
VARIABLES = ("RAY_TMPDIR", "TMPDIR")  # that name the place for it, the first that is set
MAX_SOCKET_BYTES = 107
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray puts into its folder
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def scratch_problem() -> str | None:
    """Return a line if there is no folder for temporary files where the environment wants them; None if there is."""
    for variable in VARIABLES:
        if (place := os.environ.get(variable)) and (problem := _problem(place)):
            return f"{variable}: got {place!r}, {problem}"
    try:
        place = scratch_place()
    except FileNotFoundError as error:
        return f"TMPDIR: got nothing, and {error.strerror}; accepted: a folder that can be written"
    if not _fits(Path(place).absolute() / f"{PREFIX}12345678") and _short_place() is None:
        most = MAX_SOCKET_BYTES - len(SOCKET) - len(f"/{PREFIX}12345678")
        return f"TMPDIR: got {place!r}, too long a path for sockets; accepted: one of at most {most} bytes"
    return None


def _problem(place: str) -> str | None:
    accepted = "accepted: a folder that can be written, or nothing, for the system's own"
    if not Path(place).is_dir():
        return f"no such folder; {accepted}"
    return None if os.access(place, os.W_OK | os.X_OK) else f"which cannot be written; {accepted}"


def scratch_place() -> str:
    """Return the folder for temporary files; raise FileNotFoundError if none can be written."""
    return next(filter(None, map(os.environ.get, VARIABLES)), None) or tempfile.gettempdir()


class RayDidNotStart(Exception):
    """Why not, and where Ray's logs are, which stay."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder for Ray's files, by a path that is short enough for its sockets; it goes in the end.

    It stays where the context raises RayDidNotStart.
    """
    if (problem := scratch_problem()) is not None:
        raise SpecError([problem])
    place = Path(scratch_place()).absolute()
    _sweep(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    link: Path | None = None
    owner = _own(folder)
    try:
        if not _fits(folder) and (short := _short_place()) is not None:
            link = short / f"{folder.name}-{secrets.token_hex(4)}"
            link.symlink_to(folder)
        yield link or folder
    except BaseException as error:
        if isinstance(error, RayDidNotStart):
            (folder / OWNER).unlink(missing_ok=True)  # so that nobody sweeps the logs
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(owner)
        if link is not None:
            link.unlink()


def _own(folder: Path) -> int:
    """Lock the folder's OWNER file for as long as this process lives; return its descriptor."""
    draft = folder / f"{OWNER}.draft"
    owner = os.open(draft, os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # a file system without locks: nobody sweeps there
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(folder / OWNER)  # locked already when others see it
    return owner


def _sweep(place: Path) -> None:
    """Remove the folders of drivers that were killed, and the links that led to them."""
    for file in place.glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError):  # another user's, or one that another driver sweeps
            owner = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(owner)
    for short in SHORT_PLACES:
        for link in Path(short).glob(f"{PREFIX}*"):
            if link.is_symlink() and not link.exists():
                with suppress(OSError):
                    link.unlink()


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) + len(SOCKET) <= MAX_SOCKET_BYTES


def _short_place() -> Path | None:
    """Return a folder with a short path, for a link to one with a long path."""
    return next((Path(place) for place in SHORT_PLACES if os.access(place, os.W_OK | os.X_OK)), None)
