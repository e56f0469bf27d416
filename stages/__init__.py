"""What one step does: a room a subject, a file a stage, each with `run(context)`.

This file is read by the planner, so it is light: the stages themselves, and torch with them, load when they run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graftwork.stages.contract import Context, Portion


@dataclass(frozen=True)
class Stage:
    """What the planner has to know of a stage."""

    module: str  # under graftwork.stages
    version: int  # raise it when the stage's code changes what it makes: every artifact of it is then computed anew
    orchestrates: bool = False  # starts workers of its own and waits for them, so that its task takes no CPU
    shares: bool = False  # steps have part of their work in common: a task with several, or tasks before, do it once
    memory: str = ""  # the setting to lower where its memory does not suffice


STAGES = {
    "features": Stage("features.features", version=2, orchestrates=True, memory="codec.batch"),
    "base": Stage(
        "training.base", version=4, orchestrates=True, memory="weights.micro_batch, or set weights.checkpointing"
    ),
    "classifier": Stage("evaluation.classifier", version=1),
    "profile": Stage("selection.profile", version=2),
    "distill": Stage(
        "distillation.distill",
        version=3,
        shares=True,
        memory="distill.activations, distill.batch, distill.samples or distill.draws",
    ),
    "search": Stage(
        "selection.search",
        version=4,
        orchestrates=True,
        memory="layers.search.micro_batch, or set layers.search.checkpointing",
    ),
    "select": Stage("selection.select", version=2),
    "finetune": Stage(
        "training.finetune",
        version=4,
        orchestrates=True,
        memory="finetune.micro_batch, raise finetune.workers or set finetune.checkpointing",
    ),
    "reference": Stage("evaluation.reference", version=1),
    "evaluate": Stage("evaluation.evaluate", version=3, orchestrates=True, memory="evaluate.batch"),
}


def load(stage: str) -> Callable[[Context], None]:
    """The function that does a stage's work."""
    run: Callable[[Context], None] = importlib.import_module(f"graftwork.stages.{STAGES[stage].module}").run
    return run


def recorder(stage: str) -> Callable[[Portion], list[Any]]:
    """That of a stage that `shares`."""
    record: Callable[[Portion], list[Any]] = importlib.import_module(f"graftwork.stages.{STAGES[stage].module}").record
    return record
