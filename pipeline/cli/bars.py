"""Work that is no run, shown as it goes on: a bar for each part of it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what is told how much of a part is done: its name, the units done, and their number."""
    if not sys.stderr.isatty():
        from graftwork.pipeline.cli.plain import PlainView

        view = PlainView()
        yield lambda part, done, total: view.progress(part, done, total, {})
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def report(part: str, done: int, total: int) -> None:
            task = tasks[part] = tasks.get(part) or progress.add_task(part, total=total)
            progress.update(task, completed=done)

        yield report
