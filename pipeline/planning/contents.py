"""What the files hold that a job brings along: each is read once, and remembered beside the store.

    contents/<hash of the place>    of each file there: its name, size, times and inode, and the SHA-256 of its content

A file whose size, times and inode are those that are remembered is not read again; an image in a tar has the tar's
times, and a number of its own. That is safe where a change shows in them: a file that had been written within the last
seconds before it was read is read again the next time, since another change may leave the same times (git calls such
files racy). A memory that is torn, or is not there, costs reading. Whoever writes it last wins, whole; what the other
had read is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path

from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import canonical
from graftwork.specs.data import DataFiles
from graftwork.specs.figures import amount, counted
from graftwork.specs.problems import plain, text
from graftwork.specs.reading.load import SpecError
from graftwork.stages.data.hashes import DIGEST_BYTES, ImageHashes, cut
from graftwork.stages.data.sources import identity, items, split, split_sizes
from graftwork.stages.data.tars import Span

FOLDER = "contents"  # of a store
VERSION = 1
STAT = struct.Struct("<qqqQ")  # size, mtime and ctime in ns, inode
INODE_BYTES = 8
NOTHING = bytes(STAT.size)  # of a file that is not remembered
MISSING = bytes(DIGEST_BYTES)  # the digest of what is no file, or cannot be read: whoever reads it says why
GRANULARITY_NS = 2 * 10**9  # the coarsest that a file system tells times: FAT's
QUICK_BYTES = 2**28  # that a plan reads by itself
FILES_AT_ONCE = 16
CHUNK_FILES, CHUNK_BYTES = 64, 2**25  # files that are read by one call: so many, or of so many bytes in all
PIECE_BYTES = 2**20
TRIES = 3  # of reading a file that changes meanwhile
SAMPLE = 1000  # files by whose sizes that of a folder is estimated

Report = Callable[[int, int], object]  # bytes read, of so many


@dataclass(frozen=True)
class _Files:
    """Files of a place by their names below it, or images in tars there."""

    base: str
    names: tuple[str, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)  # of those in tars

    def stat(self, number: int) -> bytes:
        """Return the stat of a file, packed; NOTHING of a link to nothing."""
        path, span = self._place(number)
        try:
            return _packed(os.stat(path), span)  # noqa: PTH116
        except OSError:
            return NOTHING

    def hashed(self, number: int) -> tuple[bytes, bytes]:
        """Return a file's digest and its stat, as `_hashed` does."""
        path, span = self._place(number)
        return _hashed(path) if span is None else _hashed(path, span)

    def in_order(self, numbers: Iterable[int]) -> list[int]:
        """Return files as they are best read: those of a tar from its beginning on."""
        if not self.spans:
            return list(numbers)
        spans = {number: self.spans[self.names[number]] for number in numbers}
        return sorted(spans, key=lambda number: (spans[number].file, spans[number].offset))

    def estimated(self, number: int) -> int:
        """Return the bytes of so many of the files, by the sizes of some."""
        some = range(0, len(self.names), max(1, len(self.names) // SAMPLE))
        sizes = [STAT.unpack(self.stat(one))[0] for one in some]
        return round(number * sum(sizes) / max(1, len(sizes)))

    def _place(self, number: int) -> tuple[str, Span | None]:
        name = self.names[number]
        span = self.spans.get(name)
        return (span.file if span else f"{self.base}/{name}" if name else self.base), span


@dataclass(frozen=True)
class Snapshot:
    """The files of a place, as they were when they were read."""

    place: str
    choice: str  # hash of the listing and the settings that the names follow from
    names: tuple[str, ...]
    stats: bytes
    digests: bytes

    @property
    def path(self) -> str:
        """The place without the settings by which its files were chosen."""
        return text(self.place.partition("\0")[0])

    def encode(self) -> bytes:
        names = os.fsencode("\0".join(self.names))
        header = {"version": VERSION, "place": text(self.place), "choice": self.choice, "files": len(self.names)}
        body = json.dumps(header | {"names": len(names)}).encode() + b"\n" + names + self.stats + self.digests
        return body + hashlib.sha256(body).digest()

    @classmethod
    def decode(cls, content: bytes) -> Snapshot:
        """Read what `encode` gave; raise ValueError for anything else."""
        body = memoryview(content)[:-DIGEST_BYTES]
        if hashlib.sha256(body).digest() != content[-DIGEST_BYTES:]:
            raise ValueError("torn")
        line, rest = content[:-DIGEST_BYTES].split(b"\n", 1)
        header = json.loads(line)
        if header["version"] != VERSION:
            raise ValueError("of another version")
        count, length = header["files"], header["names"]
        names = tuple(os.fsdecode(rest[:length]).split("\0"))
        stats, digests = rest[length : length + count * STAT.size], rest[length + count * STAT.size :]
        return cls(header["place"], header["choice"], names if count else (), stats, digests)

    def by_name(self) -> dict[str, tuple[bytes, bytes]]:
        """Return the stat and the digest of each file."""
        return dict(zip(self.names, zip(cut(self.stats, STAT.size), cut(self.digests), strict=True), strict=True))

    def by_stat(self) -> dict[bytes, bytes]:
        """Return the digests of files by size, times and inode, which stay when a folder is moved."""
        found = dict(zip(cut(self.stats, STAT.size), cut(self.digests), strict=True))
        found.pop(NOTHING, None)
        return found


class Contents:
    """What files hold: read as far as that is allowed, and remembered in the store, if there is one.

    quick: whether only what is read in a moment may be read, as for a plan. report: told the bytes that were read.
    """

    def __init__(self, store: Store | None = None, quick: bool = False, report: Report | None = None) -> None:
        self.store, self.quick, self.report = store, quick, report or (lambda done, total: None)
        self.notes: list[str] = []  # on what changed since it was last read
        self.unread: list[str] = []  # what would have to be read, and how much that is
        self._waiting: dict[str, Snapshot] = {}  # to be kept

    @cached_property
    def most(self) -> int | None:
        """Bytes that may be read; None for any number. If a store has never seen contents, it has no step of them."""
        if not self.quick:
            return None
        return QUICK_BYTES if self.store is not None and self.store.names(FOLDER) else 0

    def images(self, data: DataFiles) -> ImageHashes | None:
        """Return what the images hold that the job reads; None if they have to be read first."""
        settings = [data.heldout, data.per_class, data.skip_broken]
        every = items(data)
        known_as, listed = identity(data), [item.name for item in every]
        spans = {item.name: item.span for item in every if item.span is not None}
        choice = _choice(settings, known_as, listed)
        place = f"{data.path}\0{canonical(settings)}"
        known = self._known(place)
        sizes = split_sizes(data)
        if known is None and self.most == 0:
            number = len(every) if data.skip_broken else sum(sizes)
            size = _Files(data.path, tuple(listed), spans).estimated(number)
            self._leave("data.path", data.path, number, size)
            return None
        if known is not None and known.choice == choice:
            names = known.names
        elif data.skip_broken:  # which of them are read shows when they are
            names = tuple(listed)
        else:
            names = tuple(item.name for part in split(data) for item in part)
        digests = self._digests("data.path", place, _Files(data.path, names, spans), choice, known)
        if digests is None:
            return None
        return ImageHashes(known_as, 0 if data.skip_broken else sizes[0], names, digests)

    def files(self, field: str, place: Path, names: Sequence[str]) -> list[str] | None:
        """Return the SHA-256 of files by their names below a place ("": the place itself); None if they have to be
        read first. Raise SpecError for one that cannot be read."""
        known, files = self._known(str(place)), _Files(str(place), tuple(names))
        if known is None and self.most == 0:
            self._leave(field, str(place), len(names), files.estimated(len(names)))
            return None
        digests = self._digests(field, str(place), files, "", known)
        if digests is None:
            return None
        for name, digest in zip(names, cut(digests), strict=True):
            if digest == MISSING:
                accepted = "accepted: files that can be read"
                raise SpecError([f"{field}: got {plain(text(str(place / name)))}, which cannot be read; {accepted}"])
        return [digest.hex() for digest in cut(digests)]

    def keep(self) -> None:
        """Remember what was read; a store that may not be written costs reading it again."""
        if self.store is None:
            return
        waiting, self._waiting = self._waiting, {}
        with suppress(OSError):  # a StoreError is one
            for place, snapshot in waiting.items():
                self.store.files.write(_document(place), snapshot.encode())

    # -- reading

    def _digests(self, field: str, place: str, files: _Files, choice: str, known: Snapshot | None) -> bytes | None:
        """Return the digests of files, one after another; None if too much has to be read for them."""
        names, stats = files.names, [files.stat(number) for number in range(len(files.names))]
        joined = b"".join(stats)
        if known is not None and known.names == names and known.stats == joined and NOTHING not in stats:
            return known.digests
        others = list(self._others(place)) if known is None else []
        digests = _remembered(names, stats, known) if known is not None else _moved(stats, others)
        missing = files.in_order(number for number, digest in enumerate(digests) if digest is None)
        size = sum(STAT.unpack(stats[number])[0] for number in missing)
        if self.most is not None and size > self.most:
            self._leave(field, files.base, len(missing), size)
            return None
        if self.most is not None:
            self.most -= size
        reading = _Reading(files, stats, digests, missing, size)
        try:
            reading.go(self.report)
        except Changing as changing:
            got = f"{field}: got {plain(text(str(changing)))}, which is being written"
            raise SpecError([f"{got}; accepted: files that stay as they are while a job reads them"]) from None
        finally:
            self._waiting[place] = reading.snapshot(place, choice)
            if self.store is not None and self.store.exists():
                self.keep()
        now = reading.snapshot(place, choice)
        if line := _difference(field, known, now, len(missing)) if known is not None else _origin(field, others, now):
            self.notes.append(line)
        return now.digests

    def _leave(self, field: str, place: str, files: int, size: int) -> None:
        self.unread.append(f"{field}: {counted(files, 'file')} in {plain(text(place))}, {amount(size)}")

    # -- the memory

    def _known(self, place: str) -> Snapshot | None:
        return read_snapshot(self.store, _document(place)) if self.store is not None else None

    def _others(self, place: str) -> Iterator[Snapshot]:
        if self.store is None:
            return
        for name in self.store.names(FOLDER):
            if f"{FOLDER}/{name}" != _document(place) and (other := read_snapshot(self.store, f"{FOLDER}/{name}")):
                yield other


def read_snapshot(store: Store, document: str) -> Snapshot | None:
    """Return what is remembered of a place; None if it is not there, torn, or of another version."""
    try:
        return Snapshot.decode(store.files.read(document))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Changing(Exception):
    """A file that is written while it is read."""


class _Reading:
    """Files that are being read; `digests` and `stats` fill up as they are."""

    def __init__(
        self, files: _Files, stats: list[bytes], digests: list[bytes | None], missing: list[int], size: int
    ) -> None:
        self.files, self.stats, self.digests, self.missing, self.size = files, stats, digests, missing, size
        self.done = 0

    def go(self, report: Report) -> None:
        """Read what is missing, many files at once."""
        if not self.missing:
            return
        report(0, self.size)
        pool = ThreadPoolExecutor(FILES_AT_ONCE)
        try:
            running: set[Future[int]] = set()
            for chunk in self._chunks():
                running.add(pool.submit(self._read, chunk))
                if len(running) > 2 * FILES_AT_ONCE:
                    running = self._collect(running, report)
            while running:
                running = self._collect(running, report)
        finally:
            pool.shutdown(cancel_futures=True)

    def snapshot(self, place: str, choice: str) -> Snapshot:
        """Return it as it is now; what was not read, or was written a moment before, is not trusted."""
        stats = b"".join(
            NOTHING if digest is None else one for one, digest in zip(self.stats, self.digests, strict=True)
        )
        return Snapshot(place, choice, self.files.names, stats, b"".join(digest or MISSING for digest in self.digests))

    def _collect(self, running: set[Future[int]], report: Report) -> set[Future[int]]:
        done, left = wait(running, return_when=FIRST_COMPLETED)
        self.done += sum(one.result() for one in done)  # raises what a call raised
        report(self.done, self.size)
        return left

    def _chunks(self) -> Iterator[list[int]]:
        chunk: list[int] = []
        size = 0
        for number in self.missing:
            chunk.append(number)
            size += STAT.unpack(self.stats[number])[0]
            if len(chunk) == CHUNK_FILES or size > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _read(self, chunk: Sequence[int]) -> int:
        """Read some files; returns their bytes."""
        size = 0
        for number in chunk:
            size += STAT.unpack(self.stats[number])[0]
            self.digests[number], self.stats[number] = self.files.hashed(number)
        return size


def _hashed(path: str, span: Span | None = None) -> tuple[bytes, bytes]:
    """Return the digest of a file, or of a span of it, and its stat, or NOTHING if the stat cannot be trusted to tell
    of a change."""
    for _ in range(TRIES):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end  # noqa: PTH116
                return MISSING, NOTHING
            began = time.time_ns()
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                before = os.fstat(file.fileno())
                digest = hashlib.sha256()
                for piece in _pieces(file, span):
                    digest.update(piece)
                after = os.fstat(file.fileno())
        except OSError:
            return MISSING, NOTHING
        if _packed(after) == _packed(before):
            return digest.digest(), NOTHING if is_racy(before, began, time.time_ns()) else _packed(before, span)
    raise Changing(path)


def _pieces(file: FileIO, span: Span | None) -> Iterator[bytes]:
    """Yield what a file holds, or a span of it, piece by piece."""
    file.seek(span.offset if span else 0)
    left = span.size if span else None
    while piece := file.read(PIECE_BYTES if left is None else min(left, PIECE_BYTES)):
        yield piece
        left = left and left - len(piece)


def is_racy(stat: os.stat_result, began: int, ended: int) -> bool:
    """Return whether a file's times are so young that a change after it was read may leave them as they are.

    began, ended: of the reading, in ns. Nobody can set ctime: one in the future is of a clock that was set back, and
    the clock may yet come by it again.
    """
    recent = began - GRANULARITY_NS
    return stat.st_ctime_ns >= recent or recent <= stat.st_mtime_ns <= ended + GRANULARITY_NS


def _packed(stat: os.stat_result, span: Span | None = None) -> bytes:
    """Return what shows a change. The number of a span is of its own: two of one size in a tar are not one file."""
    if span is None:
        return STAT.pack(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    own = hashlib.sha256(b"span %d %d" % (stat.st_ino, span.offset)).digest()[:INODE_BYTES]
    return STAT.pack(span.size, stat.st_mtime_ns, stat.st_ctime_ns, int.from_bytes(own))


def _remembered(names: Sequence[str], stats: Sequence[bytes], known: Snapshot | None) -> list[bytes | None]:
    """Return the known digest of each file that is unchanged; None for a file that changed or is new."""
    if known is None:
        return [None] * len(names)
    before = known.by_name()
    digests: list[bytes | None] = []
    for name, one in zip(names, stats, strict=True):
        then, digest = before.get(name, (NOTHING, MISSING))
        digests.append(digest if one == then != NOTHING else None)
    return digests


def _choice(settings: Sequence[object], known_as: Sequence[str], names: Sequence[str]) -> str:
    found = hashlib.sha256(canonical(list(settings)).encode())
    for part in (known_as, names):
        found.update("\0".join([*part, ""]).encode(errors="surrogateescape"))
    return found.hexdigest()


def _document(place: str) -> str:
    return f"{FOLDER}/{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}"


def _moved(stats: Sequence[bytes], others: Sequence[Snapshot]) -> list[bytes | None]:
    """Return the digest of each file that other places had, as far as they did."""
    known: dict[bytes, bytes] = {}
    for other in others:
        known |= other.by_stat()
    return [known.get(one) for one in stats]


def _difference(field: str, before: Snapshot, after: Snapshot, read: int) -> str | None:
    """Return a line on how the files of a place differ from those that it had."""
    then, now = (dict(zip(one.names, cut(one.digests), strict=True)) for one in (before, after))
    both = then.keys() & now.keys()
    counts = {
        "with other contents": sum(then[name] != now[name] for name in both),
        "new": len(now.keys() - both),
        "gone": len(then.keys() - both),
    }
    if not any(counts.values()):
        counts = {"touched, with the same contents": read}
    parts = [f"{counted(count, 'file')} {what}" for what, count in counts.items() if count]
    return f"{field}: {', '.join(parts)}" if parts else None


def _origin(field: str, others: Sequence[Snapshot], after: Snapshot) -> str | None:
    """Return a line on where else the same files were."""
    for other in others:
        if other.names == after.names and other.digests == after.digests and other.path != after.path:
            return f"{field}: moved or copied from {plain(other.path)}, same contents"
    return None
