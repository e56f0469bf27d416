"""Which of the candidates are grafted: the plan of edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.edits import Edit
from graftwork.specs.evaluate import Row
from graftwork.specs.fields import KeyedIfSet, Spec
from graftwork.specs.layers.evidence import LocalityLayers
from graftwork.specs.layers.union import Layers
from graftwork.specs.metrics import METRICS, Metric
from graftwork.specs.solve import FinalistsSpec, ScoreSpec, SolveSpec
from graftwork.stages.catalog.inputs import few_samples, rootstock, scions, stream
from graftwork.stages.catalog.reference import chosen_metrics, held_against, reference_steps
from graftwork.stages.stage import Needs, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class Rule(Spec):
    """One edit of the job: what it may replace, and the strategy that chooses; pairs without one are all made."""

    edits: tuple[Edit, ...]
    layers: Layers | None


class Solving(Spec):
    """What the rules whose layers are solved are chosen by, together."""

    solve: SolveSpec
    # For scores beside what was chosen already.
    seed: Annotated[int | None, KeyedIfSet()] = None
    score: Annotated[ScoreSpec | None, KeyedIfSet()] = None


class SelectParams(Spec):
    """What the plan of edits is chosen from."""

    depth: int
    rules: tuple[Rule, ...]
    solving: Annotated[Solving | None, KeyedIfSet()] = None


class FinalistParams(Spec):
    """Plans of a solver that were finetuned shortly, of which the best goes on."""

    rows: tuple[Row, ...]  # of the table, plan by plan
    metrics: tuple[Metric, ...]
    by: str  # the column that decides


def steps(job: JobSpec) -> Iterator[StepDraft]:
    rules = tuple(Rule(edits=edits, layers=spec.layers) for spec, edits in zip(job.graft, job.rules(), strict=True))
    needs = scions(job.edits()) | {f"search/{number}": f"search/{number}" for number in job.learned()}
    if any(isinstance(rule.layers, LocalityLayers) for rule in rules):
        needs |= {"profile": "profile"}
    needs |= {f"scores/{edit.name}": f"score/{edit.name}" for edit in job.scored()}
    params = SelectParams(depth=job.model.depth, rules=rules)
    if job.solve is None:
        yield StepDraft("select", params, needs)
        return
    yield from _solved(job, job.solve, params, needs)
    if (finalists := job.solve.finalists) is not None:
        yield _best_finalist(job, finalists)


def _solved(job: JobSpec, solve: SolveSpec, params: SelectParams, needs: Needs) -> Iterator[StepDraft]:
    needs = needs | rootstock(job) | ({"cost": "cost"} if solve.limits.measured() else {})
    if solve.given == "none":
        yield StepDraft("select", params.model_copy(update={"solving": Solving(solve=solve)}), needs)
        return
    solving = Solving(solve=solve, seed=job.seed, score=job.score)
    outside = few_samples(job, job.score.samples) | stream(job.score.precision)
    yield StepDraft(
        "select", params.model_copy(update={"solving": solving}), needs, outside, precision=job.score.precision
    )


def _best_finalist(job: JobSpec, finalists: FinalistsSpec) -> StepDraft:
    metrics = chosen_metrics(job)
    by = finalists.by or METRICS[job.evaluate.metrics[0]].figures[0]
    deciding = tuple(metric for metric in metrics if by in METRICS[metric].figures)
    needs = {"select": "select"} | {f"rows/{row}": f"evaluate/{row}" for row in job.finalists()}
    needs |= {f"reference/{metric}": step for metric, step in reference_steps(held_against(deciding)).items()}
    if "likeness" in deciding:
        needs["rows/rootstock"] = "evaluate/rootstock"
    return StepDraft("select/finalist", FinalistParams(rows=job.finalists(), metrics=deciding, by=by), needs)


STAGE = Stage(version=2, steps=steps, module="graftwork.stages.selection.select")
