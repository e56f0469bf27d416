"""What tests of stores are made with: a small artifact, a store's bytes seen from outside, and damage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Origin

KEY = hashlib.sha256(b"a step").hexdigest()
OTHER = hashlib.sha256(b"another step").hexdigest()
FILES = {"model.safetensors": b"\x00weights" * 500, "figures/loss.svg": b"<svg/>", "empty.json": b""}
ORIGIN = Origin(step="distill/01.mha", run="digits-0123456789", seconds=1.5, made="2025-11-20T22:00:00Z")


def commit(store: Store, key: str = KEY, files: dict[str, bytes] = FILES) -> None:
    folder = store.workplace(key)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    store.commit(key, folder, {"stage": "distill", "version": 1}, ORIGIN)


def stored(store: Store) -> dict[str, bytes]:
    """Every file of the store, seen with fsspec's own eyes."""
    root = str(store.root)
    return {path.removeprefix(root).lstrip("/"): store.fs.cat_file(path) for path in store.fs.find(root)}


def overwrite(store: Store, name: str, content: bytes) -> None:
    path = store.root / name
    store.fs.makedirs(str(path.parent), exist_ok=True)
    store.fs.pipe_file(str(path), content)


def remove(store: Store, name: str) -> None:
    store.fs.rm_file(str(store.root / name))


def flip(content: bytes, at: float = 0.5) -> bytes:
    """The content with one bit flipped, at this share of its length."""
    place = min(int(len(content) * at), len(content) - 1)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[Store, str], None]] = {
    "a flipped byte": lambda store, name: overwrite(store, name, flip(stored(store)[name])),
    "a truncated file": lambda store, name: overwrite(store, name, stored(store)[name][:-1]),
    "an emptied file": lambda store, name: overwrite(store, name, b""),
    "a longer file": lambda store, name: overwrite(store, name, stored(store)[name] + b"\x00"),
    "a missing file": remove,
}
