"""`trial`: the plans of a solver as whole models, and beside them other plans of the same cost.

What a plan should come to is a sum over its sites, and sums do not know what sites do to each other. So each plan is
built, and its error at the model's output, its latency and its memory are measured and set beside what was predicted.
Leaves `trial.json` and a picture of it; its notes say where a prediction was off, and where a static plan of the same
cost does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from graftwork.models import checkpoints
from graftwork.models.measures.costs import forward_inputs, forward_memory, forward_seconds
from graftwork.models.measures.marginal import least_ms
from graftwork.models.numerics.precision import computing
from graftwork.specs.edits import Edit
from graftwork.specs.figures import figure
from graftwork.specs.solve import MEASURED, CostName
from graftwork.stages.artifacts.evidence import Scored, Trial, Tried, read_costs, write_trial
from graftwork.stages.artifacts.plan import read_solutions
from graftwork.stages.catalog.trial import TrialParams
from graftwork.stages.contract import Context
from graftwork.stages.selection.baselines import baselines
from graftwork.stages.selection.replacement import Replacements, read_scion, standing
from graftwork.stages.selection.score import replacements_of
from graftwork.stages.selection.solving import CostModel

TOLERANCE = 0.1  # of a prediction
R = TypeVar("R")


@dataclass(frozen=True)
class Entrant:
    """A plan that is tried."""

    name: str
    edits: tuple[Edit, ...]
    costs: Mapping[CostName, float]
    predicted_error: float | None  # None for those that no solver made
    scoring: str  # none or greedy, as of SolvedPlan


def run(context: Context) -> None:
    from graftwork.stages.pictures.trial import errors_of_plans  # matplotlib

    params: TrialParams = context.params
    replacements = replacements_of(context, params.recipe, params.seed)
    model = replacements.model
    costs = CostModel(*checkpoints.describe(context.input("base")), read_costs(context.input("cost")))
    entrants = [*_entrants(context, costs)]
    made = {*entrants[0].edits} - {*params.candidates}
    scions = {
        edit: read_scion(model, edit, context.input(f"scions/{edit.name}"), params.seed, context.device, made)
        for edit in dict.fromkeys(edit for entrant in entrants for edit in entrant.edits)
    }
    tried, by_edits = [], dict[frozenset[Edit], Scored]()
    for number, entrant in enumerate(entrants, start=1):
        context.stop_if_asked()
        scored = by_edits.get(frozenset(entrant.edits))
        if scored is None:
            scored = replacements.score({edit: scions[edit] for edit in entrant.edits})
            by_edits[frozenset(entrant.edits)] = scored
        tried.append(_tried(entrant, scored, params))
        context.report(number, len(entrants) + 1)
    plans = [entrant for entrant in entrants if entrant.predicted_error is not None]
    measured = _measured(replacements, [(), *(entrant.edits for entrant in plans)], scions, params, context.device)
    rootstock = {**costs.rootstock()}
    tried = [
        one if number >= len(plans) else one.model_copy(update={"measured": measured[number + 1]})
        for number, one in enumerate(tried)
    ]
    trial = Trial(error=params.error, rootstock=rootstock, measured_rootstock=measured[0], plans=tuple(tried))
    write_trial(context.out, trial)
    for line in (*_misses(trial, params), *_no_better(trial)):
        context.note(line)
    errors_of_plans(trial, context.out / "trial")
    context.report(len(entrants) + 1, len(entrants) + 1, {"error": tried[0].error})


def _entrants(context: Context, costs: CostModel) -> Iterator[Entrant]:
    """Yield the solver's plans, the best first, and others of its cost."""
    params: TrialParams = context.params
    plans = read_solutions(context.input("select"))
    for number, plan in enumerate(plans, start=1):
        edits = tuple(chosen.edit for chosen in plan.edits)
        yield Entrant(f"plan {number}", edits, costs.of(edits), plan.error, plan.scoring)
    solved = {chosen.edit for chosen in plans[0].edits if chosen.edit.name in plans[0].solved}
    others = [chosen.edit for chosen in plans[0].edits if chosen.edit not in solved]
    for name, laid_out in baselines(solved, params.candidates, params.seed) if solved else ():
        if laid_out is None:
            context.note(f"{name}: no such plan of the same cost, since not every operator may stand in every block")
        else:
            whole = (*others, *laid_out)
            yield Entrant(name, whole, costs.of(whole), None, "none")


def _tried(entrant: Entrant, scored: Scored, params: TrialParams) -> Tried:
    return Tried(
        name=entrant.name,
        edits=tuple(edit.name for edit in entrant.edits),
        scoring=entrant.scoring,
        predicted_error=entrant.predicted_error,
        error=scored.error(params.error),
        scored=scored,
        predicted=entrant.costs,
    )


def _measured(
    replacements: Replacements,
    plans: Sequence[Collection[Edit]],
    scions: Mapping[Edit, nn.Module],
    params: TrialParams,
    device: torch.device,
) -> list[dict[CostName, float]]:
    """Return the latency and the peak memory of a pass of each plan; they pass in turns."""
    model = replacements.model
    inputs = forward_inputs(model, params.batch, device)

    def measured(measure: Callable[[], R], edits: Collection[Edit]) -> R:
        with standing(model, {edit: scions[edit] for edit in edits}), computing(params.precision, device):
            if params.precision == "bf16":  # the first pass rounds the weights
                forward_seconds(model, inputs)
            return measure()

    seconds = partial(forward_seconds, model, inputs)
    latencies = least_ms(lambda number: measured(seconds, plans[number]), len(plans))
    memories = [measured(partial(forward_memory, model, inputs), edits) for edits in plans]
    return [{"latency_ms": latency, "peak_memory": memory} for latency, memory in zip(latencies, memories, strict=True)]


def _misses(trial: Trial, params: TrialParams) -> Iterator[str]:
    """Yield a line for each prediction of the chosen plan that was off, and for each limit that it misses by that."""
    chosen = trial.plans[0]
    predicted, measured = chosen.predicted_error or 0.0, chosen.error
    if is_off(predicted, measured) and chosen.edits:
        then = "; solve.given: greedy scores sites beside each other" if chosen.scoring == "none" else ""
        yield (
            f"the plan's {trial.words} is {measured:.4g}, where its sites' scores add up to {predicted:.4g}: what "
            f"sites do to each other is more than {TOLERANCE:.0%} of it{then}"
        )
    for name in MEASURED:
        expected, found = chosen.predicted[name], chosen.measured[name]
        if is_off(expected, found):
            yield f"the plan's {name} is {figure(name, found)}, where {figure(name, expected)} was predicted"
    for name, limit in params.limits.by_cost().items():
        if name not in MEASURED:
            continue
        least, most = limit.bounds(name, trial.rootstock[name])
        found = chosen.measured[name]
        if (most is not None and found > most) or (least is not None and found < least):
            bound = most if most is not None and found > most else least
            yield f"solve.limits.{name}: the plan as a whole has {figure(name, found)}, beyond {figure(name, bound)}"


def is_off(predicted: float, measured: float) -> bool:
    """Whether a prediction was off by more than a tenth of what was measured."""
    return abs(predicted - measured) > TOLERANCE * abs(measured)


def _no_better(trial: Trial) -> Iterator[str]:
    """Yield a line for the plans of the same cost that do as well as the chosen one."""
    chosen = trial.plans[0]
    others = [one for one in trial.plans if one.predicted_error is None and {*one.edits} != {*chosen.edits}]
    better = [one for one in others if one.error <= chosen.error]
    if better:
        named = ", ".join(f"{one.name} {one.error:.4g}" for one in sorted(better, key=lambda one: one.error))
        yield f"the plan is no better than others of the same cost: its {trial.words} is {chosen.error:.4g}; {named}"
