"""The outbox: what a run tells a server, in order, whether or not the server is there.

    outbox/<run>.jsonl            what is not delivered yet, oldest first, a document a line; empty when all is
    outbox/<run>.refused.jsonl    what the server will never take, each with its reason

Whoever puts an entry never waits: a thread delivers. While the server is away it tries again ever less often, and
keeps what waits in the store, so that a killed process loses seconds of it. An entry whose answer was lost is
delivered again, so delivering must be harmless the second time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from graftwork.pipeline.store import Store

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 15.0
KEEP_SECONDS = 5.0  # between two copies in the store of what waits
KEEP_SHARE = 50  # a copy that takes long is made less often: a 50th of the time at most
GONE_SECONDS = 3.0  # that the end waits for a server known to be away

Entry = TypeVar("Entry", bound=BaseModel)


class Unanswered(Exception):
    """The server is not there, or cannot work just now: it may take the same entry later. Its text: why, if known."""


class Refused(Exception):
    """The server will never take this entry."""


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
    ) -> None:
        """deliver: raises Unanswered or Refused. merge: two entries that follow each other as one, or None."""
        self.store, self.run, self.server = store, run, server
        self.deliver, self.merge, self.say = deliver, merge, say
        self.first = tuple(_parse(entry, kept_entries(store, run)))  # what an earlier start left
        self.entries = deque(self.first)
        self.kept = bool(self.entries)  # the store holds some
        self.kept_at, self.keeping_took = 0.0, 0.0
        self.waiting_since = time.monotonic()
        self.away = False
        self.owed = self.kept  # to tell when all is delivered
        self.delivered = 0
        self.refusals = f"outbox/{run}.refused.jsonl"
        self.refused = (store.read(self.refusals) or "").splitlines()
        self.refusal_told = False
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
            if self.entries or self.kept:
                self._keep()
        if self.entries and self.kept:
            self.say(
                f"{self.server}: {len(self.entries)} entries wait in the store; deliver them: graft resume {self.run}"
            )
        elif self.entries:
            self.say(f"{self.server}: {len(self.entries)} entries are lost, the store could not keep them")

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
                if failures > 1:  # a connection may have been closed for being idle
                    self._tell_away(str(unanswered))
                    if self.closing.is_set():
                        return
                self._rest(min(FIRST_RETRY_SECONDS * 2 ** (failures - 1), LAST_RETRY_SECONDS))
                continue
            except Refused as refused:
                self._set_aside(entry, str(refused))
            failures = 0
            self._delivered()

    def _next(self) -> Entry | None:
        """The oldest entry, waited for; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.entries or self.closing.is_set())
            return None if self.abandoned or not self.entries else self.entries[0]

    def _delivered(self) -> None:
        with self.changed:
            if self.abandoned:
                return
            self.entries.popleft()
            self.away = False
            self.delivered += self.owed
            empty = not self.entries
        if not empty:
            self._keep_if_due()
            return
        if self.kept:
            self._keep()
        if self.owed:
            self.say(f"{self.server} has all {self.delivered} entries that were kept for it")
            self.owed, self.delivered = False, 0

    def _tell_away(self, reason: str) -> None:
        if not self.away and not self.closing.is_set():
            why = f" ({reason})" if reason else ""
            self.say(f"{self.server} does not answer{why}; the job goes on, {len(self.entries)} entries are kept")
            self.owed = True
        self.away = True

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.closing.is_set():
            self._keep_if_due()
            self.closing.wait(min(left, 1.0))

    def _set_aside(self, entry: Entry, problem: str) -> None:
        if not self.refusal_told:
            self.say(f"{self.server} refuses an entry: {problem}; such are set aside in {self.refusals}")
        self.refusal_told = True
        self.refused.append(json.dumps({"problem": problem, "entry": entry.model_dump(mode="json")}))
        self._write(self.refusals, self.refused)

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
                entries = tuple(self.entries)
            self.kept = self._write(f"outbox/{self.run}.jsonl", [entry.model_dump_json() for entry in entries])
            self.kept &= bool(entries)
        self.kept_at = time.monotonic()
        self.keeping_took = self.kept_at - began

    def _write(self, name: str, lines: list[str]) -> bool:
        """Whether the store took it: one that does not fails the job by itself, or is there again next time."""
        try:
            self.store.write(name, "".join(f"{line}\n" for line in lines))
        except Exception:  # whatever the library of a remote store raises
            return False
        return True


def kept_entries(store: Store, run: str) -> list[str]:
    """The entries of a run that wait in the store, as JSON documents."""
    return (store.read(f"outbox/{run}.jsonl") or "").splitlines()


def _parse(entry: TypeAdapter[Entry], lines: list[str]) -> list[Entry]:
    entries = []
    for line in lines:
        try:
            entries.append(entry.validate_json(line))
        except ValidationError:  # of another version of ours, or damaged
            continue
    return entries
