"""The outbox: what a run tells a server, in order, whether or not the server is there.

    outbox/<run>.jsonl            what is not delivered yet, oldest first, a document a line; empty when all is
    outbox/<run>.refused.jsonl    what the server did not take while it took others, each with its reason

Whoever puts an entry never waits: a thread delivers. While the server is away, or can take nothing, it tries again ever
less often, and keeps what waits in the store, so that a killed process loses seconds of it. An entry that alone is
refused is set aside, and holds up nothing behind it. It is tried again when the outbox closes, and whenever the run
goes on: the cause may be gone. An entry whose answer was lost is delivered again, so delivering must be harmless the
second time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from graftwork.pipeline.store.artifacts import Store

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 15.0
MAX_TRIES = 8  # of one entry, within a minute, by a server that takes others
KEEP_SECONDS = 5.0  # between two copies in the store of what waits
KEEP_SHARE = 50  # a copy that takes long is made less often: a 50th of the time at most
GONE_SECONDS = 3.0  # that the end waits for a server known to be away

Entry = TypeVar("Entry", bound=BaseModel)


class Unanswered(Exception):
    """The server is not there, or takes nothing just now: it may take the same entry later.

    Its text says what the server does, as "does not answer". others: it answers to other requests.
    """

    def __init__(self, reason: str = "does not answer", others: bool = False) -> None:
        super().__init__(reason)
        self.others = others


class Refused(Exception):
    """The server does not take this entry; others it may take. Its text says what the server does."""


class Gone(Exception):
    """What an entry is about is there no more: it is dropped. Its text says what is gone."""


@dataclass(frozen=True)
class Waiting:
    """What the store holds of a run for a server: JSON documents."""

    entries: list[str]
    refused: list[str]

    def __bool__(self) -> bool:
        return bool(self.entries or self.refused)


def waiting(store: Store, run: str) -> Waiting:
    """What a run could not deliver: the entries that wait, and those that were refused."""
    entries, refused = (store.read(name) or "" for name in _files(run))
    return Waiting(entries.splitlines(), refused.splitlines())


def _files(run: str) -> tuple[str, str]:
    return f"outbox/{run}.jsonl", f"outbox/{run}.refused.jsonl"


class Outbox(Generic[Entry]):
    """Entries on their way to one server."""

    def __init__(
        self,
        store: Store,
        run: str,
        server: str,
        entry: TypeAdapter[Entry],
        deliver: Callable[[Entry], None],
        merge: Callable[[Entry, Entry], Entry | None],
        say: Callable[[str], None],
        resume: str,
    ) -> None:
        """deliver: raises Unanswered, Refused or Gone. merge: two entries that follow each other as one, or None.

        resume: the command that tries again.
        """
        self.store, self.run, self.server, self.resume = store, run, server, resume
        self.deliver, self.merge, self.say = deliver, merge, say
        left = waiting(store, run)
        refused = [text for line in left.refused if (text := _entry_of(line)) is not None]
        self.first = tuple(_parse(entry, [*refused, *left.entries]))  # what an earlier start left
        self.entries = deque(self.first)
        self.has_copy = bool(left)  # the store holds some
        self.kept_at, self.keeping_took = 0.0, 0.0
        self.waiting_since = time.monotonic()
        self.away: str | None = None  # why nothing is delivered now
        self.was_away = self.has_copy  # to tell when all is delivered
        self.delivered = 0
        self.refused: list[tuple[Entry, str]] = []  # with the reason
        self.refused_kinds: set[type[Entry]] = set()  # kinds of which it was said that they are refused
        self.has_refusals = bool(left.refused)  # the store holds some
        self.is_last_try = False  # of those that were refused
        self.changed = threading.Condition()
        self.writing = threading.Lock()
        self.closing, self.abandoned = threading.Event(), False
        self.thread = threading.Thread(target=self._work, name=f"outbox of {run}", daemon=True)
        self.thread.start()

    def put(self, *entries: Entry) -> None:
        """Returns at once."""
        with self.changed:
            if not self.entries:
                self.waiting_since = time.monotonic()
            for entry in entries:
                self._append(entry)
            self.changed.notify()

    def close(self, seconds: float) -> None:
        """Give the thread `seconds` to deliver what waits; keep the rest in the store."""
        with self.changed:
            self.closing.set()
            self.changed.notify()
        try:
            began = time.monotonic()
            while self.thread.is_alive() and time.monotonic() - began < (GONE_SECONDS if self.away else seconds):
                self.thread.join(0.1)
        finally:
            with self.changed:
                self.abandoned = True
            if self.entries or self.refused or self.has_copy:
                self._keep()
        self._say_what_is_missing()

    def _say_what_is_missing(self) -> None:
        count = len(self.entries) + len(self.refused)
        if not count:
            return
        if not self.has_copy:
            self.say(f"{self.server}: {count} entries are lost, the store could not keep them")
            return
        if self.entries:
            why = f" (it {self.away})" if self.away else ""
            self.say(f"{self.server}: {count} entries wait in the store{why}; deliver them: {self.resume}")
        else:
            _, why = self.refused[0]
            self.say(f"{self.server} {why}; {count} entries are kept in the store; try again: {self.resume}")

    def _append(self, entry: Entry) -> None:
        both = self.merge(self.entries[-1], entry) if len(self.entries) > 1 else None  # the first may be on its way
        if both is None:
            self.entries.append(entry)
        else:
            self.entries[-1] = both

    # -- the thread

    def _work(self) -> None:
        failures = 0
        while (entry := self._next()) is not None:
            try:
                self.deliver(entry)
            except Unanswered as unanswered:
                failures += 1
                if unanswered.others and failures >= MAX_TRIES:
                    self._set_aside(entry, str(unanswered))
                else:
                    if failures > 1:  # a connection may have been closed for being idle
                        self._tell_away(str(unanswered))
                        if self.closing.is_set():
                            return
                    self._rest(min(FIRST_RETRY_SECONDS * 2 ** (failures - 1), LAST_RETRY_SECONDS))
                    continue
            except Refused as refused:
                self._set_aside(entry, str(refused))
            except Gone as gone:
                self.say(f"{self.server} does not get {gone}")
            failures = 0
            self._delivered()

    def _next(self) -> Entry | None:
        """The oldest entry, waited for; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.entries or self.closing.is_set())
            if not self.entries and self.refused and not self.is_last_try and not self.abandoned:
                self.entries.extend(entry for entry, _ in self.refused)
                self.refused, self.is_last_try = [], True
            return None if self.abandoned or not self.entries else self.entries[0]

    def _delivered(self) -> None:
        with self.changed:
            if self.abandoned:
                return
            self.entries.popleft()
            self.away = None
            self.delivered += self.was_away
            empty = not self.entries
        if not empty:
            self._keep_if_due()
            return
        if self.has_copy or self.refused:
            self._keep()
        if self.was_away and not self.refused:
            self.say(f"{self.server} has all {self.delivered} entries that were kept for it")
            self.was_away, self.delivered = False, 0

    def _tell_away(self, reason: str) -> None:
        if not self.away and not self.closing.is_set():
            self.say(f"{self.server} {reason}; the job goes on, {len(self.entries)} entries are kept")
            self.was_away = True
        self.away = reason

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.closing.is_set():
            self._keep_if_due()
            self.closing.wait(min(left, 1.0))

    def _set_aside(self, entry: Entry, reason: str) -> None:
        """Keep an entry for a later try; told once for each kind of entry."""
        if type(entry) not in self.refused_kinds and not self.closing.is_set():
            self.say(f"{self.server} {reason}; such entries are kept for a later try, others go on")
        self.refused_kinds.add(type(entry))
        self.refused.append((entry, reason))

    # -- the copy in the store

    def _keep_if_due(self) -> None:
        now = time.monotonic()
        pause = max(KEEP_SECONDS, KEEP_SHARE * self.keeping_took)
        if now - self.waiting_since > KEEP_SECONDS and now - self.kept_at > pause and not self.abandoned:
            self._keep()

    def _keep(self) -> None:
        began = time.monotonic()
        with self.writing:
            with self.changed:
                entries, refused = tuple(self.entries), tuple(self.refused)
            where, where_refused = _files(self.run)
            self.has_copy = self._write(where, [entry.model_dump_json() for entry in entries])
            if refused or self.has_refusals:
                lines = [json.dumps({"problem": why, "entry": one.model_dump(mode="json")}) for one, why in refused]
                self.has_refusals = bool(refused)
                self.has_copy &= self._write(where_refused, lines)
            self.has_copy &= bool(entries or refused)
        self.kept_at = time.monotonic()
        self.keeping_took = self.kept_at - began

    def _write(self, name: str, lines: list[str]) -> bool:
        """Whether the store took it: one that does not fails the job by itself, or is there again next time."""
        try:
            self.store.write(name, "".join(f"{line}\n" for line in lines))
        except Exception:  # whatever the library of a remote store raises
            return False
        return True


def _entry_of(refused: str) -> str | None:
    """The entry in a line of those that were refused."""
    with suppress(ValueError, KeyError, TypeError):
        return json.dumps(json.loads(refused)["entry"])
    return None


def _parse(entry: TypeAdapter[Entry], lines: list[str]) -> list[Entry]:
    entries = []
    for line in lines:
        try:
            entries.append(entry.validate_json(line))
        except ValidationError:  # of another version of ours, or damaged
            continue
    return entries
