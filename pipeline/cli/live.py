"""The live tree of a run's steps that stays in place on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from graftwork.pipeline.cli.plain import duration, shown
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.runs.record import RunRecord, StepState

MARKS: dict[StepState, tuple[str, str]] = {
    "pending": ("·", "dim"),
    "running": ("▶", "cyan"),
    "cached": ("=", "dim green"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("-", "yellow"),
}


@dataclass
class Row:
    """One step as it is shown."""

    state: StepState = "pending"
    done: int = 0
    total: int = 0
    first_done: int = 0  # where a resumed step went on from
    began: float = 0.0
    seconds: float = 0.0
    note: str = ""

    def seconds_left(self) -> float | None:
        moved = self.done - self.first_done
        if self.state != "running" or moved <= 0:
            return None
        return (time.monotonic() - self.began) / moved * (self.total - self.done)


class LiveView(SilentView):
    """A tree of the steps that stays in place: bars, time left, the last loss."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.title = ""
        self.live = Live(console=Console(stderr=True), get_renderable=self._tree, refresh_per_second=4)

    def open(self, plan: Plan, record: RunRecord) -> None:
        self.title = record.run
        self.rows = {step.name: Row(state=step.state, seconds=step.seconds) for step in record.steps}
        self.live.start()

    def change(self, step: str, state: StepState, note: str = "", seconds: float = 0.0) -> None:
        row = self.rows[step]
        row.state, row.note, row.seconds = state, note, seconds
        if state == "running":
            row.began = time.monotonic()

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        row = self.rows[step]
        if row.total == 0:
            row.first_done, row.began = done, time.monotonic()
        row.done, row.total = done, total
        row.note = shown(metrics).strip() or row.note

    def say(self, line: str) -> None:
        self.live.console.print(line)

    def close(self) -> None:
        self.live.stop()

    def _tree(self) -> RenderableType:
        tree = Tree(Text(self.title, style="bold"))
        groups: dict[str, Tree] = {}
        for name, row in self.rows.items():
            group = name.rpartition("/")[0]
            if group and group not in self.rows and group not in groups:
                groups[group] = tree.add(Text(group))
            groups.get(group, tree).add(_line(name, row))
        return tree


def _line(name: str, row: Row) -> RenderableType:
    mark, style = MARKS[row.state]
    line = Table.grid(padding=(0, 1))
    for width in (2, 26, 24, 12, None):
        line.add_column(width=width)
    bar: RenderableType = ""
    if row.state == "running" and row.total:
        bar = ProgressBar(total=row.total, completed=row.done, width=24)
    left = row.seconds_left()
    clock = f"{duration(left)} left" if left is not None else duration(row.seconds) if row.seconds else ""
    line.add_row(Text(mark, style=style), Text(name, style=style), bar, clock, Text(row.note, style="dim"))
    return line
