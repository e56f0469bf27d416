"""The board: an actor on which every step, wherever it runs, writes how far it is, and which the driver reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from cluster.runtime import end_with_parent


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


class Board:
    """Holds the news until the driver comes for it; started as a Ray actor."""

    def __init__(self) -> None:
        end_with_parent()
        self._news = News()

    def write(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self._news.progress[step] = (done, total)
        if metrics:
            self._news.points.append(Point(step, done, metrics))

    def read(self) -> News:
        news, self._news = self._news, News()
        return news


class Reporter:
    """A step's pen: can be sent to any process of the cluster. Writing does not wait."""

    def __init__(self, board: ray.actor.ActorHandle, step: str) -> None:
        self.board, self.step = board, step

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        self.board.write.remote(self.step, done, total, dict(metrics or {}))
