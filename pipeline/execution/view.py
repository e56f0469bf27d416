"""The port through which people watch a run: `pipeline.cli` has the plain lines and the live tree behind it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.runs.record import RunRecord, StepState


class View(Protocol):
    """Shows the course of a run."""

    def open(self, plan: Plan, record: RunRecord) -> None: ...
    def change(self, step: str, state: StepState, note: str = "", seconds: float = 0.0) -> None: ...
    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


class SilentView:
    """Shows nothing: for calls from Python."""

    def open(self, plan: Plan, record: RunRecord) -> None: ...
    def change(self, step: str, state: StepState, note: str = "", seconds: float = 0.0) -> None: ...
    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


class LoggedView:
    """Another view, and beside it the logger `graftwork`: for programs that run jobs.

    Lines and the ends of steps are INFO, failures ERROR, progress DEBUG. No handler is set here: that is the program's.
    """

    def __init__(self, view: View) -> None:
        self.view, self.logger = view, logging.getLogger("graftwork")

    def open(self, plan: Plan, record: RunRecord) -> None:
        self.logger.info("%s: %d steps", record.run, len(plan.steps))
        self.view.open(plan, record)

    def change(self, step: str, state: StepState, note: str = "", seconds: float = 0.0) -> None:
        level = logging.ERROR if state == "failed" else logging.INFO
        self.logger.log(level, "%s: %s%s", step, state, f" ({note})" if note else "")
        self.view.change(step, state, note, seconds)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.logger.debug("%s: %d/%d %s", step, done, total, dict(metrics))
        self.view.progress(step, done, total, metrics)

    def say(self, line: str) -> None:
        self.logger.info("%s", line)
        self.view.say(line)

    def close(self) -> None:
        self.view.close()
