"""A run shown as plain lines on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.runs.record import StepState
from graftwork.specs.figures import figure


class PlainView(SilentView):
    """A line for each thing that happens, and for each tenth of a step's way."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tenths: dict[str, int] = {}

    def change(self, step: str, state: StepState, note: str = "", seconds: float = 0.0) -> None:
        took = f" in {duration(seconds)}" if seconds and state == "done" else ""
        self.say(f"{step}: {state}{took}{f' ({note})' if note else ''}")

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        tenth = 10 * done // total if total else 0
        if tenth > self.tenths.setdefault(step, 0) and done < total:
            self.say(f"{step}: {done}/{total}{shown(metrics)}")
            self.tenths[step] = tenth

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:7.1f}s] {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def shown(metrics: Mapping[str, float]) -> str:
    return "".join(f" {name} {figure(name, value)}" for name, value in metrics.items())
