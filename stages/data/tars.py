"""Tars: where the content of each file in one lies, so that it is read without unpacking.

A tar is a row of headers of 512 bytes, each with the content of its file behind it, filled up to a multiple of 512
(POSIX.1-2001, `pax`). A name or a size too large for a header stands in one of its own before it: GNU's `L`, pax's `x`.
Two blocks of zeros end it. Python's `tarfile` takes more than twice as long for a member, ends without a word where a
header is damaged, and reads as many bytes of a name as a header claims.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
HEADER = struct.Struct("100s24x12s12x8sc100s6s82x155s12x")  # name, size, checksum, type, link's target, magic, prefix
CHECKSUM = slice(148, 156)  # summed as if it were blanks
FILES, LINK = (b"0", b"\0", b"7"), b"1"
WITHOUT_CONTENT = (LINK, b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: whatever size they state
LONG_NAME, LONG_TARGET, PAX, SPARSE = b"L", b"K", b"x", b"S"
MAX_NAME_BYTES = 2**20  # of a header that holds a name for the next one
MAX_DIGITS = 20  # of a decimal number
MAX_TAIL_BYTES = 2**16  # behind the end that are looked at
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes


class UnfitTar(ValueError):
    """A file that is not a whole, plain tar; the message goes on after the file's name, as in "is empty"."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, such as those of an image in a tar."""

    file: str  # its whole path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return these bytes, fewer if the file ends before; raise OSError."""
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            return _read(descriptor, self.offset, self.size)
        finally:
            os.close(descriptor)

    def encode(self) -> bytes:
        return b"%d %d %b" % (self.offset, self.size, os.fsencode(self.file))

    @classmethod
    def decode(cls, content: bytes) -> Span:
        """Return what `encode` gave."""
        offset, size, file = content.split(b" ", 2)
        return cls(os.fsdecode(file), int(offset), int(size))


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    target: bytes


def index(path: str) -> list[tuple[str, Span]]:
    """Return the name and the content's place of each file in a tar, in its order; raise OSError, and UnfitTar."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never open  # noqa: PTH116
        raise UnfitTar("is no file")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(_members(path, descriptor, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def _members(path: str, descriptor: int, end: int) -> Iterator[tuple[str, Span]]:
    """Yield the name and the content's place of each file; raise UnfitTar where one cannot be told.

    end: the file's size in bytes.
    """
    if not end:
        raise UnfitTar("is empty")
    files: dict[bytes, Span] = {}  # for hard links to them
    special: dict[bytes, bytes] = {}  # what headers before a file's say of it
    offset = 0
    while offset < end:
        block = _read(descriptor, offset, BLOCK)
        if block == ZEROS:
            _require_end(descriptor, offset)
            return
        header = _parse(block, offset)
        start = offset + BLOCK
        size = _size(special, header, offset)
        following = start + -(-size // BLOCK) * BLOCK
        if following > end:
            raise UnfitTar(f"ends before its file at byte {offset:,} does")
        offset = following
        if header.kind in (LONG_NAME, LONG_TARGET, PAX):
            special |= _special(header.kind, _name_content(descriptor, start, size))
            continue
        _refuse_sparse(header, special)
        name, target = special.get(b"path", header.name), special.get(b"linkpath", header.target)
        special = {}
        span = files.get(target) if header.kind == LINK else Span(path, start, size)
        if header.kind in (*FILES, LINK) and span is not None and not name.endswith(b"/"):
            if b"\0" in name:
                raise UnfitTar(f"has a name with a zero byte at byte {start:,}")
            files[name] = span
            yield os.fsdecode(name), span
    raise UnfitTar("ends without the zeros that end a tar, as one that was cut off")


def _parse(block: bytes, offset: int) -> _Header:
    """Return what a header says; raise UnfitTar if it is damaged."""
    if len(block) < BLOCK:
        raise UnfitTar(f"ends within a header, at byte {offset:,}" if offset else _problem(block, offset))
    name, size, checksum, kind, target, magic, prefix = HEADER.unpack(block)
    try:
        if _number(checksum) != sum(block) - sum(block[CHECKSUM]) + len(block[CHECKSUM]) * ord(" "):
            raise ValueError
        number = _number(size)
    except ValueError:
        raise UnfitTar(_problem(block, offset)) from None
    name, target, prefix = (field.partition(b"\0")[0] for field in (name, target, prefix))
    if magic == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return _Header(name, number, kind, target)


def _number(field: bytes) -> int:
    """Return a number of a header: octal digits or, with the first bit set, big-endian; raise ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    value = int(field.strip(b" \0") or b"0", 8)
    if value < 0:
        raise ValueError
    return value


def _problem(block: bytes, offset: int) -> str:
    if offset:
        return f"is damaged at byte {offset:,}"
    packed = next((kind for begin, kind in COMPRESSED.items() if block.startswith(begin)), None)
    return f"is compressed ({packed})" if packed else "is no tar"


def _size(special: dict[bytes, bytes], header: _Header, offset: int) -> int:
    """Return the bytes of content behind a header."""
    if header.kind in WITHOUT_CONTENT:
        return 0
    if b"size" not in special or header.kind in (LONG_NAME, LONG_TARGET, PAX):
        return header.size
    if not _is_decimal(special[b"size"]):
        raise UnfitTar(f"is damaged at byte {offset:,}")
    return int(special[b"size"])


def _is_decimal(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= MAX_DIGITS


def _name_content(descriptor: int, start: int, size: int) -> bytes:
    if size > MAX_NAME_BYTES:
        raise UnfitTar(f"has a name of {size:,} bytes at byte {start:,}")
    return _read(descriptor, start, size)


def _special(kind: bytes, content: bytes) -> dict[bytes, bytes]:
    """Return what a header of that kind says of the file behind it, by pax's keywords."""
    if kind != PAX:
        return {b"path" if kind == LONG_NAME else b"linkpath": content.partition(b"\0")[0]}
    records = {}
    while content:  # `length keyword=value\n`, the length being that of it all
        length = content.partition(b" ")[0]
        if not _is_decimal(length) or not len(length) + 1 < int(length) <= len(content):
            raise UnfitTar("has a damaged extended header")
        keyword, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[keyword] = value
        content = content[int(length) :]
    return records


def _refuse_sparse(header: _Header, special: dict[bytes, bytes]) -> None:
    """Raise UnfitTar for a file whose content is not there as a whole."""
    if header.kind == SPARSE or any(keyword.startswith(b"GNU.sparse.") for keyword in special):
        raise UnfitTar("has a sparse file, which is in pieces")


def _require_end(descriptor: int, offset: int) -> None:
    """Raise UnfitTar if there is something behind the end, as in tars that were joined."""
    if any(_read(descriptor, offset, MAX_TAIL_BYTES)):
        raise UnfitTar(f"goes on behind its end at byte {offset:,}, as tars that were joined")


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Return so many bytes, fewer at the end of the file; a system reads at most 2 GiB at a time."""
    parts = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
