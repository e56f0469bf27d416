"""`select`: the plan of edits, with the score and reason of each. Leaves `plan.json`, which finetune reads.

Static strategies chose when the job was planned; the others rank their candidates here, by what `profile`, the
distillation, the scores or the search found out. What is solved for is chosen last, within limits on the whole model;
of that, `solutions.json` has a solver's other plans, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from graftwork.models import checkpoints
from graftwork.specs.edits import Edit
from graftwork.specs.figures import counted
from graftwork.specs.layers.evidence import LocalityLayers, LowestErrorLayers, LowestScoreLayers, MostLocalLayers
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.metrics import METRICS
from graftwork.specs.solve import ScoredError
from graftwork.stages.artifacts.evidence import (
    ERROR_WORDS,
    Distilled,
    read_costs,
    read_distilled,
    read_profile,
    read_scored,
    read_search,
)
from graftwork.stages.artifacts.plan import (
    ChosenEdit,
    Decided,
    SolvedPlan,
    read_solutions,
    write_decided,
    write_plan,
    write_solutions,
)
from graftwork.stages.catalog.select import FinalistParams, Rule, SelectParams, Solving
from graftwork.stages.contract import Context

RELATIVE_ERROR = "relative error"


def run(context: Context) -> None:
    if isinstance(context.params, FinalistParams):
        decide(context)
        return
    params: SelectParams = context.params
    plan: list[ChosenEdit] = []
    for number, rule in enumerate(params.rules):
        if not isinstance(rule.layers, SolvedLayers):
            plan += choose(rule, _distilled(rule.edits, context), params.depth, context, number)
        context.report(number + 1, len(params.rules))
    if params.solving is not None:
        plans = solved(params, params.solving, plan, context)
        write_solutions(context.out, plans)
        plan = [*plans[0].edits]
    plan.sort(key=lambda chosen: chosen.edit.sort_key())
    write_plan(context.out, plan)


def decide(context: Context) -> None:
    """Go on with the finalist that came to the most by the column that decides, or the least if less is better."""
    from graftwork.stages.evaluation.judges import figures_of_row  # the metrics, which no strategy needs

    params: FinalistParams = context.params
    figures = {row: figures_of_row(context, row, params.metrics)[params.by] for row in params.rows}
    numbers = {row: value for row, value in figures.items() if math.isfinite(value)}
    if not numbers:
        raise ValueError(f"solve.finalists.by: {params.by} of no finalist is a number: {figures}")
    rising = any(params.by in METRICS[metric].rising for metric in params.metrics)
    first = (max if rising else min)(numbers, key=lambda row: numbers[row])
    plan = params.rows.index(first)
    solutions = context.input("select")
    write_plan(context.out, read_solutions(solutions)[plan].edits)
    write_decided(context.out, Decided(plan=plan, by=params.by, figures=numbers))
    context.note(f"{first} goes on: {params.by} {', '.join(f'{row} {value:.4g}' for row, value in numbers.items())}")


def choose(
    rule: Rule, distilled: Mapping[Edit, Distilled], depth: int, context: Context, number: int
) -> Sequence[ChosenEdit]:
    """The edits of a rule that are made. number: of the rule, among the job's."""
    layers = rule.layers
    reason, score_is = (layers.reason() if layers else "pairs of blocks"), RELATIVE_ERROR
    scores = {edit: distilled[edit].relative_error for edit in rule.edits}
    chosen: Sequence[Edit] = rule.edits
    if isinstance(layers, LocalityLayers):
        profile = read_profile(context.input("profile"))
        score_is = f"mass within {layers.band} {layers.distance}"
        scores = {edit: profile.mass_within(edit.site.block, layers.band, layers.distance) for edit in rule.edits}
        chosen = best(scores, layers.number(depth), most=isinstance(layers, MostLocalLayers))
    elif isinstance(layers, LowestErrorLayers):
        chosen = best(scores, layers.number(depth), most=False)
    elif isinstance(layers, LowestScoreLayers):
        score_is, scores = ERROR_WORDS[layers.error], _scores(rule.edits, layers.error, context)
        chosen = best(scores, layers.number(depth), most=False)
    elif isinstance(layers, LearnedLayers):
        search = read_search(context.input(f"search/{number}"))
        score_is = "probability that the gates give to the choice"
        scores = {edit: search.confidence(edit.site.block) for edit in rule.edits}
        chosen = [edit for edit in rule.edits if search.replaces(edit.site.block, edit.option)]
    return [_chosen(edit, reason, scores[edit], score_is, distilled[edit]) for edit in chosen]


def solved(
    params: SelectParams, solving: Solving, before: Sequence[ChosenEdit], context: Context
) -> Sequence[SolvedPlan]:
    """Return a solver's plans, the best first. before: what the other rules chose, which is in each of them."""
    from graftwork.stages.selection.solving import CostModel, choices  # SciPy's solver, which no other strategy needs

    spec, made = solving.solve, [chosen.edit for chosen in before]
    candidates = [edit for rule in params.rules if isinstance(rule.layers, SolvedLayers) for edit in rule.edits]
    distilled = _distilled(candidates, context)
    measured = read_costs(context.input("cost")) if "cost" in context.inputs else None
    costs = CostModel(*checkpoints.describe(context.input("base")), measured)
    rescore = _rescoring(solving, made, context) if spec.given == "greedy" else None
    plans = []
    for choice in choices(spec, _scores(candidates, spec.error, context), made, costs, rescore):
        reason = SolvedLayers().reason() + (", one after another" if choice.scoring == "greedy" else "")
        score_is = ERROR_WORDS[spec.error] + (", beside those chosen before" if choice.scoring == "greedy" else "")
        edits = [
            *before,
            *(_chosen(edit, reason, choice.scores[edit], score_is, distilled[edit]) for edit in choice.edits),
        ]
        plan = SolvedPlan(
            edits=tuple(sorted(edits, key=lambda chosen: chosen.edit.sort_key())),
            solved=tuple(edit.name for edit in choice.edits),
            scoring=choice.scoring,
            error=choice.solution.score,
            costs=costs.of([*made, *choice.edits]),
            gap=choice.solution.gap,
        )
        plans.append(plan)
    if spec.finalists is not None and len(plans) < spec.plans:
        accepted = f"at most {len(plans)}: no more differ in {counted(spec.apart, 'site')} within the limits"
        raise ValueError(f"solve.plans: got {spec.plans}, to be finetuned each; accepted: {accepted}")
    if not plans[0].solved:
        context.note("solve.limits: the rootstock itself is within the limits, and nothing that is solved for replaced")
    if plans[0].gap:
        context.note(f"the solver gave up: its plan's error may be {plans[0].gap:.3g} above the least")
    return plans


def _rescoring(
    solving: Solving, made: Collection[Edit], context: Context
) -> Callable[[Collection[Edit], Sequence[Edit]], Mapping[Edit, float]]:
    """Return what scores candidates beside those that were chosen: what each adds to the error that these make."""
    from graftwork.stages.selection.replacement import read_scion
    from graftwork.stages.selection.score import replacements_of

    assert solving.score is not None and solving.seed is not None
    error, seed = solving.solve.error, solving.seed
    replacements = replacements_of(context, solving.score, seed)
    rounds = 0

    def rescore(chosen: Collection[Edit], candidates: Sequence[Edit]) -> Mapping[Edit, float]:
        nonlocal rounds
        rounds += 1
        context.stop_if_asked()

        def scion(edit: Edit) -> nn.Module:
            folder = context.input(f"scions/{edit.name}")
            return read_scion(replacements.model, edit, folder, seed, context.device, made)

        standing = {edit: scion(edit) for edit in (*made, *chosen)}
        before = replacements.score(standing).error(error)
        scores = {}
        for edit in candidates:
            scores[edit] = replacements.score(standing | {edit: scion(edit)}).error(error) - before
        context.report(rounds, 0, {"sites_chosen": len(chosen), "error": before})
        return scores

    return rescore


def _scores(edits: Sequence[Edit], error: ScoredError, context: Context) -> dict[Edit, float]:
    return {edit: read_scored(context.input(f"scores/{edit.name}")).error(error) for edit in edits}


def _distilled(edits: Sequence[Edit], context: Context) -> dict[Edit, Distilled]:
    return {edit: read_distilled(context.input(f"scions/{edit.name}")) for edit in edits}


def _chosen(edit: Edit, reason: str, score: float, score_is: str, distilled: Distilled) -> ChosenEdit:
    return ChosenEdit(
        edit=edit,
        reason=reason,
        score=score,
        score_is=score_is,
        heldout_error=distilled.heldout_error,
        relative_error=distilled.relative_error,
    )


def best(scores: Mapping[Edit, float], count: int, most: bool) -> list[Edit]:
    """The edits with the largest (or smallest) scores; of equal ones the earlier blocks."""
    return sorted(scores, key=lambda edit: (-scores[edit] if most else scores[edit], edit.site.block))[:count]
