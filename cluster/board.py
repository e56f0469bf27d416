"""The board: an actor on which every step, wherever it runs, writes how far it is, and which the driver reads.

The other way the driver writes one word on it: that all work is to stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from graftwork.cluster.session.orphans import end_with_parent

LISTEN_SECONDS = 1.0


@dataclass(frozen=True)
class Point:
    """Metrics of a step at one moment of its work."""

    step: str
    done: int
    metrics: Mapping[str, float]


@dataclass
class News:
    """What was written since the board was last read."""

    progress: dict[str, tuple[int, int]] = field(default_factory=dict)  # step -> done, total
    points: list[Point] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)  # of steps whose task may have others to do


class Board:
    """Holds the news until the driver comes for it; started as a Ray actor."""

    def __init__(self) -> None:
        end_with_parent()
        self._news = News()
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def write(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self._news.progress[step] = (done, total)
        if metrics:
            self._news.points.append(Point(step, done, metrics))

    def end(self, result: Any) -> None:
        self._news.results.append(result)

    def read(self) -> News:
        news, self._news = self._news, News()
        return news


class Reporter:
    """A step's pen: can be sent to any process of the cluster. Writing does not wait."""

    def __init__(self, board: ray.actor.ActorHandle, step: str) -> None:
        self.board, self.step = board, step

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        self.board.write.remote(self.step, done, total, dict(metrics or {}))

    def ended(self, result: Any) -> None:
        """Say what came of the step."""
        self.board.end.remote(result)


class StopSignal:
    """Whether the work is to stop; can be sent to any process of the cluster. A thread listens, so asking is free."""

    def __init__(self, board: ray.actor.ActorHandle) -> None:
        self.board = board
        self._heard = threading.Event()
        self._listener: threading.Thread | None = None

    def __call__(self) -> bool:
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        return self._heard.is_set()

    def now(self) -> bool:
        """The same, asked of the board and waited for."""
        if ray.get(self.board.stopping.remote()):
            self._heard.set()
        return self._heard.is_set()

    def _listen(self) -> None:
        try:
            while not self.now():
                time.sleep(LISTEN_SECONDS)
        except ray.exceptions.RayError:  # the driver is gone, and with it the board
            return

    def __reduce__(self) -> tuple[type[StopSignal], tuple[ray.actor.ActorHandle]]:
        return StopSignal, (self.board,)
