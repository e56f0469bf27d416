"""Checkpoints of a training, written while it goes on.

What was gathered is written, hashed and put into the store by a thread of the first worker. One save at a time: the
next waits for it, and raises what it came to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class CheckpointWriter:
    """Runs one save at a time on a thread. A context, after which the thread is gone and no save is under way."""

    def __init__(self, minutes: float) -> None:
        """minutes: between the last save, or the beginning, and the one that is due."""
        self.seconds, self.last = 60 * minutes, time.monotonic()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.saving: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def due(self) -> bool:
        """Return whether the time has come, and the last save is written."""
        written = self.saving is None or self.saving.done()
        return written and time.monotonic() - self.last >= self.seconds

    def save(self, write: Callable[[], None]) -> None:
        """Begin a save; call `wait` before anything is gathered for it, so that memory holds one state at a time."""
        self.wait()
        self.saving, self.last = self.thread.submit(write), time.monotonic()

    def wait(self) -> None:
        """Return once nothing is being saved; raises what the save raised."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()
