"""What the images of a job hold: the list that its keys are made of, and which `features` holds what it reads against.

It stays in the artifact as `images.sha256`, which `sha256sum -c` understands, but for images in tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftwork.specs.problems import plain, text
from graftwork.stages.data.tars import Span

IMAGES = "images.sha256"
DIGEST_BYTES = 32
ESCAPES = ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"))  # in names, as sha256sum writes them
AGAIN = "accepted: files that stay as they are while a job reads them; run the job again"


class ChangedImage(ValueError):
    """An image is not what it was when the job's keys were made; the message is one line."""


@dataclass(frozen=True)
class ImageHashes:
    """The images that a job reads, those to train on first, and the SHA-256 of each, one after another.

    If broken images are left out, these are all there are, and num_training is 0: which are read shows later.
    """

    classes: tuple[str, ...]
    num_training: int
    names: tuple[str, ...]
    digests: bytes

    @cached_property
    def root(self) -> str:
        """The hash of it all, which stands in keys."""
        header = {"classes": [text(name) for name in self.classes], "training": self.num_training}
        names = os.fsencode("\0".join(self.names))
        return hashlib.sha256(b"\0\0".join((json.dumps(header).encode(), names, self.digests))).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, bytes]:
        return dict(zip(self.names, cut(self.digests), strict=True))

    def require_same(self, classes: Sequence[str], names: Sequence[str]) -> None:
        """Raise ChangedImage if the classes or the images that are listed now are others."""
        if tuple(classes) != self.classes:
            raise ChangedImage(f"data.path: got other class folders than when the job began; {AGAIN}")
        if tuple(names) != self.names:
            came, went = set(names) - set(self.names), set(self.names) - set(names)
            one = plain(text(min(came or went))) if came or went else "their order"
            raise ChangedImage(f"data.path: images came or went since the job began ({one}); {AGAIN}")


def require_content(home: Path, name: str, digest: str, span: Span | None = None) -> None:
    """Raise ChangedImage if a file, or a span of a tar, does not have that SHA-256."""
    with (home / name).open("rb") if span is None else io.BytesIO(span.read()) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ChangedImage(f"data.path: {plain(text(name))} holds something else than when the job began; {AGAIN}")


def cut(joined: bytes, size: int = DIGEST_BYTES) -> list[bytes]:
    """Return the pieces of equal size that were joined."""
    return [joined[start : start + size] for start in range(0, len(joined), size)]


def write_hashes(file: Path, digests: Mapping[str, bytes]) -> None:
    """Write the digest of each file by its name."""
    with file.open("wb") as out:
        for name, digest in digests.items():
            mark = b"\\" if escaped(name) != os.fsencode(name) else b""
            out.write(b"%b%b  %b\n" % (mark, digest.hex().encode(), escaped(name)))


def escaped(name: str) -> bytes:
    """Return a name as it stands in the file."""
    raw = os.fsencode(name)
    for sign, instead in ESCAPES:
        raw = raw.replace(sign, instead)
    return raw


def read_hashes(content: bytes) -> dict[bytes, str]:
    """Return the digests that `write_hashes` wrote, by name as it stands there."""
    lines = (line.lstrip(b"\\").partition(b"  ") for line in content.split(b"\n") if line)
    return {name: digest.decode() for digest, _, name in lines}
