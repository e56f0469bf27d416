"""Verification: every artifact of a store is read and held against its manifest; what differs is set aside."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from graftwork.cluster.machine import num_cpus
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import MANIFEST, RottenArtifact

READERS = 8  # threads: a remote store makes them wait, hashing a local one keeps cores busy


@dataclass(frozen=True)
class Checked:
    """An artifact that was read."""

    key: str
    step: str | None  # that made it, and the run; None where the manifest does not say
    run: str | None
    size: int  # bytes, by the manifest
    file: str | None = None  # the first that is damaged, None if all are whole
    problem: str | None = None
    aside: str | None = None  # where it was set aside

    @property
    def whole(self) -> bool:
        return self.file is None

    def __str__(self) -> str:
        made = f"{self.step} of {self.run}" if self.step else "of what step, it does not say"
        aside = f"; set aside in {self.aside}, the next run computes it again" if self.aside else ""
        return f"damaged: {self.key[:12]} ({made}): {self.file}: {self.problem}{aside}"


def verify(store: Store, dry_run: bool = False) -> Iterator[Checked]:
    """Read every artifact, in the order of their keys; those that are damaged are set aside unless `dry_run`.

    What lies under a key without a manifest is no artifact, and left alone: a step may be committing it.
    """
    with ThreadPoolExecutor(READERS if not store.local else min(READERS, num_cpus())) as pool:
        for checked in pool.map(lambda key: _check(store, key), store.keys()):
            if checked is None:
                continue
            damaged = not checked.whole and not dry_run
            yield replace(checked, aside=store.quarantine(checked.key)) if damaged else checked


def _check(store: Store, key: str) -> Checked | None:
    """None where there is no artifact, or none any more."""
    text = store.read(f"artifacts/{key}/{MANIFEST}")
    checked = _read(store, key)
    changed = text != store.read(f"artifacts/{key}/{MANIFEST}")
    return _read(store, key) if changed else checked  # it was committed anew, or removed, under our eyes


def _read(store: Store, key: str) -> Checked | None:
    step, run, size = None, None, 0
    try:
        manifest = store.sound_manifest(key)
        if manifest is None:
            return None
        step, run, size = manifest.origin.step, manifest.origin.run, sum(file.size for file in manifest.files.values())
        store.artifact(key).verify()
    except RottenArtifact as rotten:
        if rotten.file == MANIFEST and rotten.problem == "missing":
            return None
        return Checked(key, step, run, size, rotten.file, rotten.problem)
    return Checked(key, step, run, size)
