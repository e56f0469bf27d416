"""What the sites that are solved for hold: the least sum of scores within the limits, by models.selection.solver.

With scores of candidates alone the sum misses what sites do to each other. Greedily, one candidate after another is
chosen: of the best plan that has those chosen before, the one that adds the least; then the others are scored again
beside it. Each plan on the way keeps within the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.selection.solver import Infeasible, Limit, Option, Problem, Solution, reachable, solve
from graftwork.specs.costs import GraftCost, graft_cost, rootstock_cost
from graftwork.specs.edits import Edit
from graftwork.specs.figures import figure
from graftwork.specs.solve import CostName, SolveSpec, described
from graftwork.stages.artifacts.evidence import MeasuredCosts

T = TypeVar("T")
Rescore = Callable[[Collection[Edit], Sequence[Edit]], Mapping[Edit, float]]


@dataclass(frozen=True)
class CostModel:
    """What whole models cost by formula and, if it was measured, by what each operator adds."""

    config: RootstockConfig
    carried: tuple[Edit, ...]  # edits that the rootstock comes with
    measured: MeasuredCosts | None = None

    def rootstock(self) -> dict[CostName, float]:
        """Return what the rootstock costs, with the edits that it comes with."""
        bare, measured = self._formula(()).rootstock, self.measured
        known: dict[CostName, float] = {"flops": bare.flops, "params": bare.params}
        return known | (
            {} if measured is None else {"latency_ms": measured.latency_ms, "peak_memory": measured.peak_memory}
        )

    def change(self, edit: Edit) -> dict[CostName, float]:
        """Return what an edit changes of the whole model's costs."""
        cost, measured = self._formula((edit,)), self.measured
        change = cost.graft - cost.rootstock
        known: dict[CostName, float] = {"flops": change.flops, "params": change.params}
        if measured is not None:
            latency_ms, peak_memory = measured.change(edit)
            known |= {"latency_ms": latency_ms, "peak_memory": peak_memory}
        return known

    def of(self, edits: Collection[Edit]) -> dict[CostName, float]:
        """Return what the model with these edits costs; by what is measured, a sum of what each changes."""
        changes = [self.change(edit) for edit in edits]
        return {name: value + sum(change[name] for change in changes) for name, value in self.rootstock().items()}

    def _formula(self, edits: Collection[Edit]) -> GraftCost:
        config = self.config
        bare = rootstock_cost(config, config.place, config.in_channels, config.num_classes)
        return graft_cost(bare, edits, config.place, self.carried)


def problem_of(
    solve_spec: SolveSpec, scores: Mapping[Edit, float], made: Collection[Edit], costs: CostModel
) -> Problem:
    """Return the choice as a problem for the solver.

    scores: of the candidates. made: edits that are made in any case; what they cost counts against the limits.
    """
    rootstock, base = costs.rootstock(), costs.of(made)
    limited = solve_spec.limits.by_cost()
    limits = {name: Limit(*limit.bounds(name, rootstock[name])) for name, limit in limited.items()}
    options = tuple(
        Option(edit.name, frozenset(map(str, edit.places)), score, _by_name(costs.change(edit)))
        for edit, score in scores.items()
    )
    return Problem(options, _by_name(base), _by_name(limits))


def _by_name(values: Mapping[CostName, T]) -> dict[str, T]:
    return {str(name): value for name, value in values.items()}


@dataclass(frozen=True)
class Choice:
    """A solution, by edits."""

    edits: tuple[Edit, ...]
    scores: Mapping[Edit, float]  # of those, that the choice went by
    scoring: str  # none or greedy, as of SolvedPlan
    solution: Solution


def choices(
    spec: SolveSpec,
    scores: Mapping[Edit, float],
    made: Collection[Edit],
    costs: CostModel,
    rescore: Rescore | None = None,
) -> list[Choice]:
    """Return the plans, the best first. Raise ValueError with what can be reached if the limits leave none.

    rescore: for greedy choosing: what each candidate adds beside those that were chosen.
    """
    problem = problem_of(spec, scores, made, costs)
    try:
        solutions = solve(problem, spec.plans, spec.apart)
    except Infeasible:
        raise ValueError(f"solve.limits: {unreachable(problem, spec)}") from None
    by_name = {edit.name: edit for edit in scores}
    alone = [_choice(solution, by_name, scores, "none") for solution in solutions]
    if spec.given == "none":
        return alone
    assert rescore is not None
    first = _greedily(problem, scores, rescore)
    return [first, *(one for one in alone if set(one.edits) != set(first.edits))][: spec.plans]


def unreachable(problem: Problem, spec: SolveSpec) -> str:
    """Return what the limits leave, in words: what each cost can come to if the others hold."""
    parts = []
    for name in problem.limits:
        try:
            least, most = reachable(problem, name)
            parts.append(f"{name} {figure(name, least)} .. {figure(name, most)}")
        except Infeasible:
            alone = Problem(problem.options, problem.rootstock, {name: problem.limits[name]})
            least, most = reachable(alone, name)
            parts.append(f"{name} {figure(name, least)} .. {figure(name, most)} without the other limits")
    return f"got {described(spec.limits)}, which no choice meets; accepted: limits within {', '.join(parts)}"


def _choice(solution: Solution, by_name: Mapping[str, Edit], scores: Mapping[Edit, float], scoring: str) -> Choice:
    edits = tuple(by_name[option.name] for option in solution.chosen)
    return Choice(edits, {edit: scores[edit] for edit in edits}, scoring, solution)


def _greedily(problem: Problem, scores: Mapping[Edit, float], rescore: Rescore) -> Choice:
    """Return the plan to which greedy choosing comes."""
    by_name = {edit.name: edit for edit in scores}
    committed: dict[Edit, float] = {}  # what each added when it was chosen
    current = dict(scores)
    while True:
        known = current | committed
        options = tuple(replace(option, score=known[by_name[option.name]]) for option in problem.options)
        solution = solve(Problem(options, problem.rootstock, problem.limits), fixed={edit.name for edit in committed})[
            0
        ]
        ahead = [by_name[option.name] for option in solution.chosen if by_name[option.name] not in committed]
        if not ahead:
            return _choice(solution, by_name, known, "greedy")
        best = min(ahead, key=lambda edit: current[edit])
        committed[best] = current[best]
        taken = frozenset[object]().union(*(edit.places for edit in committed))
        current = dict(rescore([*committed], [edit for edit in scores if not edit.places & taken]))
        current |= {edit: scores[edit] for edit in scores if edit not in current and edit not in committed}
