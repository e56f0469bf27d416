"""`select`: the plan of edits, with the score and reason of each. Leaves `plan.json`, which finetune reads.

Static strategies chose when the job was planned; the others rank their candidates here, by what `profile`, the
distillation or the search found out.
"""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.specs.edits import Edit
from graftwork.specs.layers.evidence import LocalityLayers, LowestErrorLayers, MostLocalLayers
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.stages.artifacts.evidence import Distilled, read_distilled, read_profile, read_search
from graftwork.stages.artifacts.plan import _PLAN, ChosenEdit
from graftwork.stages.catalog.select import Rule, SelectParams
from graftwork.stages.contract import Context

RELATIVE_ERROR = "relative error"


def run(context: Context) -> None:
    params: SelectParams = context.params
    plan: list[ChosenEdit] = []
    for number, rule in enumerate(params.rules):
        distilled = {edit: read_distilled(context.input(f"scions/{edit.name}")) for edit in rule.edits}
        plan += choose(rule, distilled, params.depth, context, number)
        context.report(number + 1, len(params.rules))
    plan.sort(key=lambda chosen: chosen.edit.sort_key())
    (context.out / "plan.json").write_bytes(_PLAN.dump_json(tuple(plan), indent=1))


def choose(
    rule: Rule, distilled: dict[Edit, Distilled], depth: int, context: Context, number: int
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
    elif isinstance(layers, LearnedLayers):
        search = read_search(context.input(f"search/{number}"))
        score_is = "probability that the gates give to the choice"
        scores = {edit: search.confidence(edit.site.block) for edit in rule.edits}
        chosen = [edit for edit in rule.edits if search.replaces(edit.site.block, edit.option)]
    return [
        ChosenEdit(
            edit=edit,
            reason=reason,
            score=scores[edit],
            score_is=score_is,
            heldout_error=distilled[edit].heldout_error,
            relative_error=distilled[edit].relative_error,
        )
        for edit in chosen
    ]


def best(scores: dict[Edit, float], count: int, most: bool) -> list[Edit]:
    """The edits with the largest (or smallest) scores; of equal ones the earlier blocks."""
    return sorted(scores, key=lambda edit: (-scores[edit] if most else scores[edit], edit.site.block))[:count]
