"""Which of the candidates are grafted: the plan of edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.edits import Edit
from graftwork.specs.fields import Spec
from graftwork.specs.layers.evidence import LocalityLayers
from graftwork.specs.layers.union import Layers
from graftwork.stages.catalog.inputs import scions
from graftwork.stages.stage import Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class Rule(Spec):
    """One edit of the job: what it may replace, and the strategy that chooses; pairs are all made."""

    edits: tuple[Edit, ...]
    layers: Layers | None


class SelectParams(Spec):
    """What the plan of edits is chosen from."""

    depth: int
    rules: tuple[Rule, ...]


def steps(job: JobSpec) -> Iterator[StepDraft]:
    depth = job.model.depth
    rules = tuple(Rule(edits=spec.edits(depth), layers=getattr(spec, "layers", None)) for spec in job.graft)
    needs = scions(job.edits()) | {f"search/{number}": f"search/{number}" for number in job.learned()}
    if any(isinstance(rule.layers, LocalityLayers) for rule in rules):
        needs |= {"profile": "profile"}
    yield StepDraft("select", SelectParams(depth=depth, rules=rules), needs)


STAGE = Stage(version=2, steps=steps, module="graftwork.stages.selection.select")
