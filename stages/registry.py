"""All stages by name, in the order in which the planner asks for their steps."""

from __future__ import annotations

import importlib

from graftwork.specs import resources
from graftwork.stages.stage import Stage


def _declared(name: str) -> Stage:
    stage = importlib.import_module(f"graftwork.stages.catalog.{name}").STAGE
    assert isinstance(stage, Stage), name
    return stage


STAGES = {name: _declared(name) for name in resources.STAGES}


def makes_model(step: str) -> bool:
    """Whether a step of that name leaves a model folder; no, if its stage is none of ours."""
    stage = STAGES.get(step.partition("/")[0])
    return stage is not None and stage.makes_model
