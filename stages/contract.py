"""What a stage is given and what it gives back: the contract between the scheduler and a step's work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork.specs.resources import StepResources

if TYPE_CHECKING:
    import torch

    from graftwork.stages.data.hashes import ImageHashes


NOTES = "notes.json"  # of an artifact: lines that the run which made it tells its user


class Stopped(Exception):
    """The work was asked to stop; what it had done is saved."""


def never() -> bool:
    """For work that nobody asks to stop."""
    return False


def note(folder: Path, line: str) -> None:
    """Add a line to the notes of the artifact that is being made in this folder."""
    path = folder / NOTES
    lines = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*lines, line], indent=1))


class Input(Protocol):
    """An artifact that the step needs."""

    @property
    def key(self) -> str: ...

    def path(self) -> Path:
        """A local folder with its files, verified."""
        ...


class Partial(Protocol):
    """Checkpoints that outlive the process, and go when the step commits."""

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Have `write` make a file and publish it whole under `name`."""
        ...

    def load(self, name: str) -> Path | None:
        """The last file saved under `name`, or None."""
        ...


class Report(Protocol):
    """Where a step says how far it is: `done` of `total` units, with the metrics of that moment."""

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None: ...


@dataclass(frozen=True)
class TaskScope:
    """What the steps that run in one task share."""

    next: Sequence[Any] = ()  # the parameters of those that the same task does after it
    partials: Sequence[Partial] = ()  # the checkpoints of those
    state: dict[str, Any] = field(default_factory=dict)  # what a step leaves for them, by name
    recorded: Callable[[], Sequence[Any]] | None = None  # fetches what tasks before left for it: one a part, or None


@dataclass(frozen=True)
class Context:
    """All that a stage gets; what it leaves in `out` becomes its artifact."""

    step: str
    params: Any  # the stage's class in specs.steps
    inputs: Mapping[str, Input]
    out: Path
    partial: Partial
    report: Report
    resources: StepResources
    device: torch.device  # of this task; workers that the stage starts are given their own
    stopping: Callable[[], bool] = never
    task_scope: TaskScope = TaskScope()
    images: ImageHashes | None = None  # that the plan knows of, of a step that reads images

    def stop_if_asked(self) -> None:
        """Raise Stopped where that is wanted; to be called where nothing would be lost."""
        if self.stopping():
            raise Stopped(self.step)

    def input(self, role: str) -> Path:
        """The verified local folder of the artifact that the step needs as `role`."""
        return self.inputs[role].path()

    def note(self, line: str) -> None:
        """Add a line to the notes of the artifact, which the run that makes it tells its user."""
        note(self.out, line)


@dataclass(frozen=True)
class Portion:
    """What a stage's `record` gets: one of `num_shares` equal shares of what its steps have in common."""

    steps: Sequence[Any]  # their parameters; `record` returns something for each
    inputs: Mapping[str, Input]
    device: torch.device
    share: int  # of num_shares, counted from 0
    num_shares: int
    stopping: Callable[[], bool] = never
