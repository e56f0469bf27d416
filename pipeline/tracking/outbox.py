"""The outbox: what a run tells a server, in order, whether or not the server is there.

Whoever puts an entry never waits: a thread delivers. While the server is away, or can take nothing, it tries again ever
less often, and keeps what waits in the store, so that a killed process loses seconds of it. An entry that alone is
refused is set aside, and holds up nothing behind it. It is tried again when the outbox closes, and whenever the run
goes on: the cause may be gone. An entry whose answer was lost is delivered again, so delivering must be harmless the
second time.

| part | what it is about | its lock |
|---|---|---|
| `Queue` | entries in memory: those that wait, those that were refused | `changed`, held for moments |
| `StoreCopy` (held_back.py) | the same in the store | `writing`, held while the store writes |
| `Outbox` | the thread: what is delivered, whether the server is away, what is said of it | none: one thread |
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic

from pydantic import TypeAdapter

from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.tracking.held_back import Entry, Refusals, StoreCopy

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 15.0
MAX_TRIES = 8  # of one entry, within a minute, by a server that takes others
KEEP_SECONDS = 5.0  # between two copies in the store of what waits
GONE_SECONDS = 3.0  # that the end waits for a server known to be away


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


class Queue(Generic[Entry]):
    """The entries that wait, oldest first, and those that were refused, for one more try at the end."""

    def __init__(self, entries: Iterable[Entry], merge: Callable[[Entry, Entry], Entry | None]) -> None:
        self.entries, self.merge = deque(entries), merge
        self.refused: list[tuple[Entry, str]] = []  # with the reason
        self.waiting_since = time.monotonic()
        self.changed = threading.Condition()
        self.closing, self.abandoned, self.is_last_try = threading.Event(), False, False

    def __len__(self) -> int:
        return len(self.entries) + len(self.refused)

    def put(self, *entries: Entry) -> None:
        with self.changed:
            if not self.entries:
                self.waiting_since = time.monotonic()
            for entry in entries:
                self._append(entry)
            self.changed.notify()

    def _append(self, entry: Entry) -> None:
        both = self.merge(self.entries[-1], entry) if len(self.entries) > 1 else None  # the first may be on its way
        if both is None:
            self.entries.append(entry)
        else:
            self.entries[-1] = both

    def oldest(self) -> Entry | None:
        """The oldest entry, waited for; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.entries or self.closing.is_set())
            if not self.entries and self.refused and not self.is_last_try and not self.abandoned:
                self.entries.extend(entry for entry, _ in self.refused)
                self.refused, self.is_last_try = [], True
            return None if self.abandoned or not self.entries else self.entries[0]

    def drop_oldest(self) -> bool:
        """Whether it was still there to be dropped: nothing changes any more once the queue is abandoned."""
        with self.changed:
            if not self.abandoned:
                self.entries.popleft()
            return not self.abandoned

    def close(self) -> None:
        """From now on nobody waits for entries to come."""
        with self.changed:
            self.closing.set()
            self.changed.notify()

    def abandon(self) -> None:
        """Leave what waits as it is."""
        with self.changed:
            self.abandoned = True

    def content(self) -> tuple[tuple[Entry, ...], Refusals[Entry]]:
        """What waits, and what was refused, at one moment."""
        with self.changed:
            return tuple(self.entries), tuple(self.refused)


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
        self.server, self.resume = server, resume
        self.deliver, self.say = deliver, say
        self.copy = StoreCopy(store, run, entry)
        self.queue = Queue(self.copy.first, merge)
        self.away: str | None = None  # why nothing is delivered now
        self.was_away = self.copy.is_there  # to tell when all is delivered
        self.delivered = 0  # of what was kept for it
        self.refused_kinds: set[type[Entry]] = set()  # kinds of which it was said that they are refused
        self.thread = threading.Thread(target=self._work, name=f"outbox of {run}", daemon=True)
        self.thread.start()

    @property
    def first(self) -> tuple[Entry, ...]:
        """What an earlier start of the run left."""
        return self.copy.first

    @property
    def entries(self) -> deque[Entry]:
        """What waits."""
        return self.queue.entries

    def put(self, *entries: Entry) -> None:
        """Returns at once."""
        self.queue.put(*entries)

    def close(self, seconds: float) -> None:
        """Give the thread `seconds` to deliver what waits; keep the rest in the store."""
        self.queue.close()
        try:
            began = time.monotonic()
            while self.thread.is_alive() and time.monotonic() - began < (GONE_SECONDS if self.away else seconds):
                self.thread.join(0.1)
        finally:
            self.queue.abandon()
            if len(self.queue) or self.copy.is_there:
                self._keep()
        self._say_what_is_missing()

    def _say_what_is_missing(self) -> None:
        count = len(self.queue)
        if not count:
            return
        if not self.copy.is_there:
            self.say(f"{self.server}: {count} entries are lost, the store could not keep them")
            return
        if self.entries:
            why = f" (it {self.away})" if self.away else ""
            self.say(f"{self.server}: {count} entries wait in the store{why}; deliver them: {self.resume}")
        else:
            _, why = self.queue.refused[0]
            self.say(f"{self.server} {why}; {count} entries are kept in the store; try again: {self.resume}")

    # -- the thread

    def _work(self) -> None:
        failures = 0
        while (entry := self.queue.oldest()) is not None:
            try:
                self.deliver(entry)
            except Unanswered as unanswered:
                failures += 1
                if unanswered.others and failures >= MAX_TRIES:
                    self._set_aside(entry, str(unanswered))
                else:
                    if failures > 1:  # a connection may have been closed for being idle
                        self._tell_away(str(unanswered))
                        if self.queue.closing.is_set():
                            return
                    self._rest(min(FIRST_RETRY_SECONDS * 2 ** (failures - 1), LAST_RETRY_SECONDS))
                    continue
            except Refused as refused:
                self._set_aside(entry, str(refused))
            except Gone as gone:
                self.say(f"{self.server} does not get {gone}")
            failures = 0
            self._go_on()

    def _go_on(self) -> None:
        """Drop what was delivered; say so when that was the last of what had been kept."""
        if not self.queue.drop_oldest():
            return
        self.away = None
        self.delivered += self.was_away
        if self.entries:
            self._keep_if_due()
            return
        if self.copy.is_there or self.queue.refused:
            self._keep()
        if self.was_away and not self.queue.refused:
            self.say(f"{self.server} has all {self.delivered} entries that were kept for it")
            self.was_away, self.delivered = False, 0

    def _tell_away(self, reason: str) -> None:
        if not self.away and not self.queue.closing.is_set():
            self.say(f"{self.server} {reason}; the job goes on, {len(self.entries)} entries are kept")
            self.was_away = True
        self.away = reason

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.queue.closing.is_set():
            self._keep_if_due()
            self.queue.closing.wait(min(left, 1.0))

    def _set_aside(self, entry: Entry, reason: str) -> None:
        """Keep an entry for a later try; told once for each kind of entry."""
        if type(entry) not in self.refused_kinds and not self.queue.closing.is_set():
            self.say(f"{self.server} {reason}; such entries are kept for a later try, others go on")
        self.refused_kinds.add(type(entry))
        self.queue.refused.append((entry, reason))

    def _keep_if_due(self) -> None:
        waited = time.monotonic() - self.queue.waiting_since
        if waited > KEEP_SECONDS and self.copy.is_due(KEEP_SECONDS) and not self.queue.abandoned:
            self._keep()

    def _keep(self) -> None:
        began = time.monotonic()
        with self.copy.writing:  # before the queue is read: what is written last is what is so last
            self.copy.write(*self.queue.content())
        self.copy.made_at = time.monotonic()
        self.copy.took = self.copy.made_at - began
