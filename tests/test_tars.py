"""Where the files in a tar lie: as the standard library finds them, and one line for a tar that is not whole."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.stages.data import tars
from graftwork.stages.data.tars import Span, UnfitTar, index

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = ("a.jpg", "d/e.txt", "x" * 100, "d/" * 60 + "f.jpg", "ü/ñ.txt", "caf\udce9.png", "two\nlines.png")
LONG = ("x" * 101, "y" * 300 + ".jpg", ("e" * 90 + "/") * 4 + "é.txt")  # for which ustar has no room


def write(file: Path, names: tuple[str, ...], style: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of files of random content, folders, and links."""
    with tarfile.open(file, "w", format=style, encoding="utf-8", errors="surrogateescape") as tar:
        for number, name in enumerate(names):
            add(tar, name, os.urandom(number * 300))
            add(tar, f"folder-{number}", b"", tarfile.DIRTYPE)
        add(tar, "hard.jpg", b"", tarfile.LNKTYPE, names[1])
        add(tar, "soft.jpg", b"", tarfile.SYMTYPE, names[1])
    return file


def add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, target
    tar.addfile(member, io.BytesIO(content))


def by_the_standard_library(file: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        opened = ((member.name, tar.extractfile(member)) for member in tar if member.isreg() or member.islnk())
        return [(name, content.read()) for name, content in opened if content is not None]


def read(file: Path) -> list[tuple[str, bytes]]:
    return [(name, span.read()) for name, span in index(str(file))]


@pytest.mark.parametrize("style", FORMATS)
def test_files_are_where_the_standard_library_finds_them(tmp_path: Path, style: int) -> None:
    names = NAMES if style == tarfile.USTAR_FORMAT else NAMES + LONG
    file = write(tmp_path / "a.tar", names, style)
    assert read(file) == by_the_standard_library(file)
    assert [name for name, _ in read(file)] == [*names, "hard.jpg"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("style", ["v7", "ustar", "gnu", "posix"])
def test_files_of_the_command_tar_are_found(tmp_path: Path, style: str) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b" * 90):
        (tmp_path / "in" / name).write_bytes(name.encode() * 100)
    os.link(tmp_path / "in" / "a.jpg", tmp_path / "in" / "c.jpg")
    file = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", tmp_path / "in", f"--format={style}", "-cf", file, "."], check=True)
    assert read(file) == by_the_standard_library(file) and len(read(file)) == 3


def test_a_size_of_more_than_eight_digits_is_read(tmp_path: Path) -> None:
    """GNU's binary sizes, and pax's: the content is a hole, which no disk holds."""
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = tarfile.TarInfo("large")
        member.size = 2**33 + 5
        header = member.tobuf(style)
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2**33 + 512 + 1024)
        ((name, span),) = index(str(tmp_path / "a.tar"))
        assert (name, span.offset, span.size) == ("large", len(header), member.size)


def test_a_span_goes_to_another_process_as_bytes() -> None:
    span = Span(os.fsdecode(b"/data/two words/caf\xe9.tar"), 512, 7)
    assert Span.decode(span.encode()) == span


def test_a_span_of_a_file_that_became_shorter_is_shorter(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert Span(str(tmp_path / "a"), 8, 9).read() == b"89"


Spoil = Callable[[Path], object]


def cut(size: int) -> Spoil:
    return lambda file: os.truncate(file, size)


def flip(place: int) -> Spoil:
    def spoil(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    return spoil


def replaced(content: Callable[[bytes], bytes]) -> Spoil:
    return lambda file: file.write_bytes(content(file.read_bytes()))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (cut(0), "is empty"),
        (cut(100), "is no tar"),
        (cut(512 + 100), "ends before its file at byte 0 does"),
        (cut(3 * 512 - 100), "ends within a header, at byte 1,024"),
        (cut(2 * 512), "ends without the zeros that end a tar, as one that was cut off"),
        (flip(1024 + 3), "is damaged at byte 1,024"),
        (flip(3), "is no tar"),
        (replaced(gzip.compress), "is compressed (gzip)"),
        (replaced(lambda content: content + content), "goes on behind its end at byte 2,048, as tars that were joined"),
    ],
)
def test_a_tar_that_is_not_whole_is_one_line(tmp_path: Path, spoil: Spoil, said: str) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        add(tar, "a", b"a" * 400)
        add(tar, "b", b"b" * 400)
    spoil(file)
    with pytest.raises(UnfitTar) as caught:
        index(str(file))
    assert str(caught.value) == said


def test_a_name_that_claims_to_be_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.tar", (*NAMES, "z" * 3000))
    monkeypatch.setattr(tars, "MAX_NAME_BYTES", 2000)
    with pytest.raises(UnfitTar, match=r"has a name of 3,0\d\d bytes at byte"):
        index(str(file))


@pytest.mark.parametrize("record", [b"%b path=a\n" % (b"9" * 5000), b"5020 size=%b\n" % (b"9" * 5009)])
def test_a_number_of_thousands_of_digits_is_damage(tmp_path: Path, record: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x", record, tarfile.XHDTYPE)
        add(tar, "a", b"a")
    with pytest.raises(UnfitTar, match="damaged"):
        index(str(tmp_path / "a.tar"))


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x", b"12 path=a\0b\n", tarfile.XHDTYPE)
        add(tar, "a", b"a")
    with pytest.raises(UnfitTar, match="has a name with a zero byte"):
        index(str(tmp_path / "a.tar"))


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={}) as tar:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a"}
        tar.addfile(member)
    with pytest.raises(UnfitTar, match="has a sparse file, which is in pieces"):
        index(str(tmp_path / "a.tar"))


def test_whatever_is_no_tar_raises_nothing_else(tmp_path: Path) -> None:
    """Bytes are changed in headers, of which half have the right checksum; the end is cut off now and then."""
    draws, file = random.Random(0), tmp_path / "a.tar"
    whole = write(file, NAMES + LONG).read_bytes()
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draws.randint(1, 3)):
            content[draws.randrange(len(content) // 512) * 512 + draws.randrange(512)] = draws.randrange(256)
        if draws.random() < 0.5:
            correct(content)
        file.write_bytes(content[: draws.randrange(len(content))] if draws.random() < 0.2 else content)
        try:
            index(str(file))
        except UnfitTar as error:
            assert str(error).isprintable()
            refused += 1
    assert 100 < refused < 400


def correct(content: bytearray) -> None:
    """Make the checksums right, of blocks that look like headers."""
    for start in range(0, len(content), 512):
        if content[start + 257 : start + 262] == b"ustar":
            block = content[start : start + 512]
            content[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
