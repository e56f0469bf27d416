"""Stopping a run in good order: asked by a signal, or by `graft stop` from anywhere that reaches the store.

The first request has the tasks save a checkpoint and end; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from graftwork.pipeline.store.artifacts import Store

STORE_SECONDS = 2.0  # between looks for a request in the store
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Stop:
    """Whether a run is to stop, and at whose wish."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.exit_code = 128 + signal.SIGTERM
        self._looked = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals for as long as the context lasts; nothing can be taken outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take_signals()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_signals(self) -> None:
        """Once more: Ray takes them for itself as it starts."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def wanted(self, store: Store, run: str) -> bool:
        if self.reason is None and time.monotonic() - self._looked > STORE_SECONDS:
            self._looked = time.monotonic()
            if store.read(_request(run)) is not None:
                self.reason = "graft stop"
        return self.reason is not None

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason, self.exit_code = SIGNALS[signal.Signals(number)], 128 + number


def ask(store: Store, run: str) -> None:
    """Leave a request for the driver of a run."""
    store.write(_request(run), run)


def clear(store: Store, run: str) -> None:
    store.remove(_request(run))


def _request(run: str) -> str:
    return f"stops/{run}"
