"""What one step does: one file a stage, each with `run(context)`.

This file is read by the planner, so it is light: the stages themselves, and torch with them, load when they run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork.specs.job import StepResources

if TYPE_CHECKING:
    import torch

    from graftwork.stages.hashes import ImageHashes


@dataclass(frozen=True)
class Stage:
    """What the planner has to know of a stage."""

    version: int  # raise it when the stage's code changes what it makes: every artifact of it is then computed anew
    orchestrates: bool = False  # starts workers of its own and waits for them, so that its task takes no CPU
    shares: bool = False  # steps have part of their work in common: a task with several, or tasks before, do it once
    memory: str = ""  # the setting to lower where its memory does not suffice


STAGES = {
    "features": Stage(version=2, orchestrates=True, memory="codec.batch"),
    "base": Stage(version=4, orchestrates=True, memory="weights.micro_batch, or set weights.checkpointing"),
    "classifier": Stage(version=1),
    "profile": Stage(version=2),
    "distill": Stage(
        version=3, shares=True, memory="distill.activations, distill.batch, distill.samples or distill.draws"
    ),
    "search": Stage(
        version=4, orchestrates=True, memory="layers.search.micro_batch, or set layers.search.checkpointing"
    ),
    "select": Stage(version=2),
    "finetune": Stage(
        version=4,
        orchestrates=True,
        memory="finetune.micro_batch, raise finetune.workers or set finetune.checkpointing",
    ),
    "reference": Stage(version=1),
    "evaluate": Stage(version=3, orchestrates=True, memory="evaluate.batch"),
}


NOTES = "notes.json"  # of an artifact: lines that the run which made it tells its user


class Stopped(Exception):
    """The work was asked to stop; what it had done is saved."""


def never() -> bool:
    """For work that nobody asks to stop."""
    return False


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
class Together:
    """What a step shares with others."""

    next: Sequence[Any] = ()  # the parameters of those that the same task does after it
    kept: dict[str, Any] = field(default_factory=dict)  # what a step leaves for them, by name
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
    together: Together = Together()
    images: ImageHashes | None = None  # that the plan knows of, of a step that reads images

    def stop_if_asked(self) -> None:
        """Raise Stopped where that is wanted; to be called where nothing would be lost."""
        if self.stopping():
            raise Stopped(self.step)

    def input(self, role: str) -> Path:
        """The verified local folder of the artifact that the step needs as `role`."""
        return self.inputs[role].path()


def load(stage: str) -> Callable[[Context], None]:
    """The function that does a stage's work."""
    run: Callable[[Context], None] = importlib.import_module(f"graftwork.stages.{stage}").run
    return run


@dataclass(frozen=True)
class Portion:
    """What a stage's `record` gets: one of `parts` equal parts of what its steps have in common."""

    steps: Sequence[Any]  # their parameters; `record` returns something for each
    inputs: Mapping[str, Input]
    device: torch.device
    part: int
    parts: int
    stopping: Callable[[], bool] = never


def recorder(stage: str) -> Callable[[Portion], list[Any]]:
    """That of a stage that `shares`."""
    record: Callable[[Portion], list[Any]] = importlib.import_module(f"graftwork.stages.{stage}").record
    return record
