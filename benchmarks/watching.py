"""Nobody watches: what steps tell goes nowhere."""

from __future__ import annotations

from graftwork.cluster.board import News
from graftwork.pipeline.execution.scheduler import Watcher
from graftwork.pipeline.execution.task import StepResult
from graftwork.pipeline.store.leases import LeaseOwner


class Unwatched(Watcher):
    """A watcher of an execution, to be filled in where something is wanted."""

    def started(self, step: str) -> None:
        pass

    def news(self, news: News) -> None:
        pass

    def ended(self, step: str, result: StepResult) -> None:
        pass

    def failed(self, step: str, problem: str) -> None:
        pass

    def skipped(self, step: str, because_of: str) -> None:
        pass

    def waiting(self, step: str, holder: LeaseOwner) -> None:
        pass

    def made_elsewhere(self, step: str) -> None:
        pass

    def stop_wanted(self) -> bool:
        return False

    def short(self, step: str, wanted: str) -> None:
        pass
