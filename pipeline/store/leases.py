"""Leases: who is at work on what, so that drivers that share a store do each step once.

    leases/<name>.<generation>.json

A lease is taken by creating the next generation, which only one can. Its holder rewrites that file every few seconds.
Whoever finds a lease taken may take it over once its holder is known to be gone (a dead process of this machine, an
earlier attempt at the very same task), or once its file has not changed for `EXPIRES_SECONDS` by the waiter's own
clock: clocks of two machines are never compared. A holder that was only cut off may thus find its work done by
another; both come to the same bits, and the first to commit wins.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ValidationError

from graftwork.pipeline.store.artifacts import Store

BEAT_SECONDS = 5.0
EXPIRES_SECONDS = 30.0


class LeaseOwner(BaseModel):
    """The driver that has a lease: its run, machine and process."""

    run: str
    task: str  # two attempts at one task have the same; the later one supersedes the earlier
    host: str = ""
    machine: str = ""  # within which a process number means something
    process: int = 0
    born: int = 0  # when that process began: numbers are used again

    @classmethod
    def me(cls, run: str, task: str) -> LeaseOwner:
        process = os.getpid()
        return cls(
            run=run, task=task, host=socket.gethostname(), machine=_machine(), process=process, born=_born(process)
        )

    def gone(self) -> bool:
        """Whether its process is certainly no more; of another machine's processes nothing is certain."""
        return bool(self.machine) and self.machine == _machine() and _born(self.process) != self.born

    def __str__(self) -> str:
        return f"{self.run} (process {self.process} on {self.host})"


class Document(BaseModel):
    """What lies in a lease's file; each writing of it is another text."""

    holder: LeaseOwner
    beat: int = 0
    nonce: str = ""


@dataclass(frozen=True)
class LeaseSnapshot:
    """Another driver's lease as last read; a different text means a heartbeat."""

    name: str
    text: str  # of its file: any other text is a sign of life
    holder: LeaseOwner


class Lease:
    """A lease of ours; it stays ours while the process lives and reaches the store."""

    def __init__(self, store: Store, name: str, generation: int, holder: LeaseOwner) -> None:
        self.store, self.name, self.generation = store, name, generation
        self._document = Document(holder=holder, nonce=uuid.uuid4().hex)
        self._ended, self._writing = threading.Event(), threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Leave no trace of it. A store that is full or away may keep one, which then expires by itself."""
        self._ended.set()
        with self._writing, suppress(OSError):  # a beat that is being written ends first; there is none after it
            self.store.remove(_file(self.name, self.generation))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._document = self._document.model_copy(update={"beat": self._document.beat + 1})
            with self._writing, suppress(OSError):  # a store that is away for long costs the lease, never the work
                if not self._ended.is_set():
                    self.store.write(_file(self.name, self.generation), self._document.model_dump_json())


def take(store: Store, name: str, holder: LeaseOwner, over: LeaseSnapshot | None = None) -> Lease | LeaseSnapshot:
    """Take the lease, or return a snapshot of it if another driver has it. over: a lease known to have expired."""
    while True:
        snapshot, generation = _current(store, name)
        if snapshot is not None and not (
            snapshot.holder.gone()
            or snapshot.holder.task == holder.task
            or (over is not None and snapshot.text == over.text)
        ):
            return snapshot
        text = Document(holder=holder, nonce=uuid.uuid4().hex).model_dump_json()
        if store.create(_file(name, generation + 1), text):
            for old in range(generation + 1):
                store.remove(_file(name, old))
            return Lease(store, name, generation + 1, holder)


def look(store: Store, name: str) -> LeaseSnapshot | None:
    """Who has the lease, dead or alive; None where it is free."""
    return _current(store, name)[0]


def _current(store: Store, name: str) -> tuple[LeaseSnapshot | None, int]:
    """Who has the lease, and its generation; None where it is free, and -1 where nothing is left of earlier ones.

    The two are of one moment: whoever creates the next generation is not the second to take what was free.
    """
    while (generation := _last_generation(store, name)) >= 0:
        text = store.read(_file(name, generation))
        document = _parsed(text)
        if text is not None and document is not None:
            return LeaseSnapshot(name, text, document.holder), generation
        if _last_generation(store, name) == generation:  # it was not released meanwhile: it cannot be read
            return None, generation
    return None, -1


def active_leases(store: Store) -> set[str]:
    """The names of all leases that someone may be at work under."""
    found = (look(store, name) for name in {name_of(file) for file in store.names("leases")})
    return {one.name for one in found if one is not None and not one.holder.gone()}


def name_of(file: str) -> str:
    """The lease that a file in `leases` is of."""
    return file.removesuffix(".json").rpartition(".")[0]


class LeaseWatch:
    """A watch on another driver's lease, which tells when it is free to take."""

    def __init__(self, first: LeaseSnapshot) -> None:
        self.last, self.changed = first, time.monotonic()

    def expired(self, store: Store) -> bool:
        """Whether it may be taken over, or is free; to be asked again and again."""
        now = look(store, self.last.name)
        if now is None or now.holder.gone():
            return True
        if now.text != self.last.text:
            self.last, self.changed = now, time.monotonic()
        return time.monotonic() - self.changed > EXPIRES_SECONDS


@contextmanager
def releasing(lease: Lease) -> Iterator[None]:
    """Release the lease when the block ends, however it does."""
    try:
        yield
    finally:
        lease.release()


def _file(name: str, generation: int) -> str:
    return f"leases/{name}.{generation:06d}.json"


def _last_generation(store: Store, name: str) -> int:
    numbers = [file.split(".")[-2] for file in store.names("leases") if name_of(file) == name]
    return max((int(number) for number in numbers if number.isdigit()), default=-1)


def _parsed(text: str | None) -> Document | None:
    try:
        return Document.model_validate_json(text) if text is not None else None
    except ValidationError:
        return None


@cache
def _machine() -> str:
    """This boot of this machine, and the namespace of its process numbers; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(process: int) -> int:
    """When a process of this machine began, in clock ticks since boot; 0 where there is none."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(fields[18])
