"""Where each step of a run is, and what the scheduler looks at now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.cluster.session import runtime
from graftwork.pipeline.planning.plan import Step
from graftwork.pipeline.store.leases import LeaseSnapshot, LeaseWatch

SHORTAGE_SECONDS = 30.0  # without any node for a step, before that is told

State = Literal["waiting", "leased elsewhere", "done", "failed", "skipped"]


@dataclass
class StepProgress:
    """Where a step of the plan is.

    waiting ──> waiting, with a task ──> done | failed
       ^             │         └───────> leased elsewhere ──> done, if the other driver made it
       │             │                        │
       └─────────────┴────────────────────────┘  its task was lost, or the other driver is gone
    waiting ──> skipped, when a step that it needs failed
    """

    step: Step
    state: State = "waiting"
    task: Any = None  # ref of the task that does it
    alone: bool = False  # to be done by a task of its own: it was lost together with others
    lease: LeaseWatch | None = None  # while it is leased elsewhere
    expired: LeaseSnapshot | None = None  # what to take over when it begins
    begun: bool = False  # its user was told so
    last_metrics: str = ""

    @property
    def open(self) -> bool:
        """Whether it has yet to come to its end."""
        return self.state in ("waiting", "leased elsewhere")

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def given_up(self) -> bool:
        return self.state in ("failed", "skipped")


@dataclass(frozen=True)
class Task:
    """What Ray does of the plan in one go."""

    steps: tuple[str, ...]
    fed_by_recording: bool = False  # others recorded for it


class ShortageWatch:
    """Tells, once a step, that it waits for a node which is not there; an autoscaler may bring one."""

    def __init__(self) -> None:
        self.had_room: dict[str, float] = {}  # when last seen, by step
        self.reported: set[str] = set()

    def look(self, steps: Sequence[Step]) -> Iterator[tuple[str, str]]:
        """Yield the steps that have waited too long, and what they ask for."""
        now = time.monotonic()
        there_is_room: dict[str, bool] = {}  # by what is asked for, since asking Ray takes a while
        for step in steps:
            if step.name in self.reported:
                continue
            wanted = runtime.amounts_line(step.resources)
            if wanted not in there_is_room:
                there_is_room[wanted] = runtime.room_for(step.resources) > 0
            if there_is_room[wanted]:
                self.had_room[step.name] = now
            elif now - self.had_room.setdefault(step.name, now) > SHORTAGE_SECONDS:
                self.reported.add(step.name)
                yield step.name, wanted


class Every:
    """True at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True
