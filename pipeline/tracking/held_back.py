"""What a run could not deliver yet, as the store has it.

outbox/<run>.jsonl            what is not delivered yet, oldest first, a document a line; empty when all is
outbox/<run>.refused.jsonl    what the server did not take while it took others, each with its reason
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from graftwork.pipeline.store.artifacts import Store

KEEP_SHARE = 50  # a copy that takes long is made less often: a 50th of the time at most

Entry = TypeVar("Entry", bound=BaseModel)
Refusals = Sequence[tuple[Entry, str]]  # with the reason


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


class StoreCopy(Generic[Entry]):
    """The copy in the store of what waits, and of what an earlier start of the run left there."""

    def __init__(self, store: Store, run: str, entry: TypeAdapter[Entry]) -> None:
        self.store, self.run = store, run
        left = waiting(store, run)
        refused = [text for line in left.refused if (text := _entry_of(line)) is not None]
        self.first = tuple(_parse(entry, [*refused, *left.entries]))  # what an earlier start left
        self.is_there = bool(left)  # whether the store holds some
        self.has_refusals = bool(left.refused)  # whether some of it was refused
        self.made_at, self.took = 0.0, 0.0
        self.writing = threading.Lock()  # the thread and whoever closes the outbox may both write

    def is_due(self, seconds: float) -> bool:
        """Whether the last copy is older than that, and than its own time allows."""
        return time.monotonic() - self.made_at > max(seconds, KEEP_SHARE * self.took)

    def write(self, entries: Sequence[Entry], refused: Refusals[Entry]) -> None:
        """Have the store hold these, as far as it takes them."""
        where, where_refused = _files(self.run)
        self.is_there = self._put(where, [entry.model_dump_json() for entry in entries])
        if refused or self.has_refusals:
            lines = [json.dumps({"problem": why, "entry": one.model_dump(mode="json")}) for one, why in refused]
            self.has_refusals = bool(refused)
            self.is_there &= self._put(where_refused, lines)
        self.is_there &= bool(entries or refused)

    def _put(self, name: str, lines: list[str]) -> bool:
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
