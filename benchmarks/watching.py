"""Nobody watches: what steps tell goes nowhere."""

from __future__ import annotations

from graftwork.pipeline.execution.scheduler import Watcher


class Unwatched(Watcher):
    """A watcher of an execution, to be filled in where something is wanted."""

    def stop_wanted(self) -> bool:
        return False
