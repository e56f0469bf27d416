"""Garbage collection: what no run refers to is freed.

Kept are the artifacts and partial work of every step of every run in `runs/`, what is remembered of the files that they
read, whatever a job that works now has leased, and what is younger than a few days. To free what a run refers to, the
run is forgotten first.

Jobs may run meanwhile. Each piece is looked at again right before its turn, and an artifact's manifest goes first: a
job that misses an artifact that it has just seen finds it rotten, and computes it again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.pipeline.planning.contents import FOLDER, read_snapshot
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.files import FileInfo
from graftwork.pipeline.store.leases import active_leases, name_of
from graftwork.pipeline.store.local import DRAFTS
from graftwork.pipeline.store.manifest import MANIFEST
from graftwork.specs.reading.load import SpecError

DAY = 86400.0  # seconds
SILENT = 3600.0  # seconds after which a lease that is not renewed is dead, whatever machine it was on
Kind = Literal["artifact", "leftover", "partial", "rotten", "draft", "upload", "lease", "contents"]


@dataclass(frozen=True)
class Garbage:
    """Files that nothing refers to.

    artifact: an artifact. leftover: what a killed commit left. partial: checkpoints. rotten: what was set aside.
    draft, upload: a file of which a kill left a part. lease: one that its holder left behind.
    contents: the hashes of files that no run reads; without them, the files are read again.
    """

    kind: Kind
    place: str  # below the store
    size: int  # bytes
    modified: float  # seconds since the epoch
    key: str | None = None  # of the step whose work it is
    step: str | None = None  # its name, where that is known
    of: str | None = None  # the path whose contents it remembers


@dataclass(frozen=True)
class Holding:
    """What a run keeps from being freed."""

    run: str
    status: str
    started: str
    size: int  # bytes of all artifacts that it refers to
    alone: int  # bytes of those that no other run refers to


class References:
    """The keys in use: by runs, apart from those to be forgotten, or by a lease."""

    def __init__(self, store: Store, forgotten: Collection[str] = ()) -> None:
        self.store, self.forgotten = store, forgotten
        self.runs: dict[str, RunRecord] = {}  # a run's keys never change: each record is read once
        self.refresh()

    def refresh(self) -> None:
        self.runs = {run: self.runs.get(run) or record.load(self.store, run) for run in self.store.runs()}
        self.referred = {step.key for run, one in self.runs.items() if run not in self.forgotten for step in one.steps}
        jobs = [one.job for run, one in self.runs.items() if run not in self.forgotten]
        self.paths = {value for job in jobs for value in _texts(job)}
        self.released = {step.key for run in self.forgotten for step in self.runs[run].steps} - self.referred
        silent = time.time() - SILENT
        alive = {name_of(path) for path, file in self.store.files.tree("leases").items() if file.modified > silent}
        self.leased = active_leases(self.store) & alive

    def uses(self, one: Garbage) -> bool:
        if one.kind in ("rotten", "draft", "upload"):
            return False
        if one.key in self.leased:
            return True
        match one.kind:
            case "artifact":
                return one.key in self.referred
            case "partial":  # of no use beside the artifact
                return one.key in self.referred and self.store.state(str(one.key)) != "cached"
            case "contents":  # of a path, or of the folder that it lies in
                return any(path == one.of or path.startswith(f"{one.of}/") for path in self.paths)
        return False


def garbage(store: Store, older_than: float = 7 * DAY, forget: Collection[str] = ()) -> list[Garbage]:
    """What can be freed, the largest first.

    older_than: seconds. What only the runs to `forget` refer to goes at any age; raises SpecError where one of them is
    being worked on.
    """
    references = References(store, forget)
    for run in forget:
        own = {step.key for step in references.runs[run].steps} & references.released
        if references.leased & {record.lease_name(run), *own}:
            raise SpecError([f"forget: got {run!r}, which a job works on; accepted: a run that has stopped"])
    steps = {step.key: step.name for one in references.runs.values() for step in one.steps}
    before = time.time() - older_than
    return sorted(
        (
            one
            for one in _all(store, steps)
            if (one.modified < before or one.key in references.released) and not references.uses(one)
        ),
        key=lambda one: -one.size,
    )


def free(store: Store, garbage: Sequence[Garbage], forget: Sequence[str] = ()) -> Iterator[Garbage]:
    """Forget these runs, then free what nothing has come to refer to; yields each piece when it is gone."""
    for run in forget:
        for place in (f"runs/{run}.json", f"outbox/{run}.jsonl", f"outbox/{run}.refused.jsonl", f"stops/{run}"):
            store.remove(place)
    references = References(store)
    for one in garbage:
        references.refresh()
        if not references.uses(one):
            _remove(store, one)
            yield one


def holdings(store: Store, forget: Collection[str] = ()) -> list[Holding]:
    """What each run keeps from being freed, first the run that would free most."""
    sizes = {manifest.key: sum(file.size for file in manifest.files.values()) for manifest in store.manifests()}
    runs = [one for run, one in References(store).runs.items() if run not in forget]
    keys = {one.run: {step.key for step in one.steps} for one in runs}
    users = Counter(key for own in keys.values() for key in own)
    rows = []
    for one in runs:
        size = sum(sizes.get(key, 0) for key in keys[one.run])
        alone = sum(sizes.get(key, 0) for key in keys[one.run] if users[key] == 1)
        rows.append(Holding(one.run, one.status, one.started, size, alone))
    return sorted(rows, key=lambda row: (-row.alone, row.run))


def _all(store: Store, steps: dict[str, str]) -> Iterator[Garbage]:
    """Every piece that could be garbage. steps: the names of steps that runs tell, by key."""
    for key, files in _folders(store, "artifacts"):
        manifest = store.manifest(key) if MANIFEST in files else None
        step = manifest.origin.step if manifest else steps.get(key)
        yield _piece("artifact" if MANIFEST in files else "leftover", f"artifacts/{key}", files, key, step)
    for key, files in _folders(store, "partial"):
        yield _piece("partial", f"partial/{key}", files, key, steps.get(key))
    for name, files in _folders(store, "rotten"):
        key, _, nanoseconds = name.rpartition("-")
        when = int(nanoseconds) / 1e9 if nanoseconds.isdigit() else 0.0
        yield Garbage("rotten", f"rotten/{name}", sum(file.size for file in files.values()), when, key, steps.get(key))
    for file, info in store.files.tree("leases").items():
        key = name_of(file)
        yield Garbage("lease", f"leases/{file}", info.size, info.modified, key, steps.get(key))
    for name, files in _folders(store, DRAFTS):
        yield _piece("draft", f"{DRAFTS}/{name}", files)
    for name, info in store.files.uploads().items():
        yield Garbage("upload", name, info.size, info.modified)
    for name, info in store.files.tree(FOLDER).items():
        place = f"{FOLDER}/{name}"
        snapshot = read_snapshot(store, place)
        yield Garbage("contents", place, info.size, info.modified, of=snapshot.path if snapshot else None)


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _piece(
    kind: Kind, place: str, files: dict[str, FileInfo], key: str | None = None, step: str | None = None
) -> Garbage:
    size, modified = sum(file.size for file in files.values()), max(file.modified for file in files.values())
    return Garbage(kind, place, size, modified, key, step)


def _folders(store: Store, folder: str) -> Iterator[tuple[str, dict[str, FileInfo]]]:
    """What lies right below a folder, each with its files; a file is one with itself alone."""
    grouped: dict[str, dict[str, FileInfo]] = {}
    for path, info in store.files.tree(folder).items():
        name, _, rest = path.partition("/")
        grouped.setdefault(name, {})[rest] = info
    yield from sorted(grouped.items())


def _remove(store: Store, one: Garbage) -> None:
    if one.kind == "upload":
        store.files.abort(one.place)
        return
    if one.kind == "artifact":
        store.remove(f"{one.place}/{MANIFEST}")
    if one.kind in ("lease", "contents"):
        store.remove(one.place)
        return
    store.files.remove_tree(one.place)
