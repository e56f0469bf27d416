"""Whether some choice of what is solved for keeps a job's limits, before anything runs: of costs that have formulas."""

from __future__ import annotations

from collections.abc import Iterator

from graftwork.pipeline.planning.plan import carried_edits
from graftwork.specs.costs import Cost, GraftCost, graft_cost, rootstock_cost
from graftwork.specs.edits import Edit
from graftwork.specs.figures import figure
from graftwork.specs.job import JobSpec
from graftwork.specs.solve import CostName, SolveSpec
from graftwork.specs.solving import bounds
from graftwork.stages.data.sources import num_classes


def unreachable_limits(job: JobSpec) -> list[str]:
    """Return a line for each limit that no choice meets; for all of them, if none meets them together."""
    if job.solve is None:
        return []
    formula = _Formula(job)
    lines = [*_alone(job, job.solve, formula)]
    return lines or _together(job.solve, formula)


class _Formula:
    """What the job's models cost by formula. Parameters are left out where the number of classes is not known."""

    def __init__(self, job: JobSpec) -> None:
        self.job, self.carried = job, carried_edits(job)
        count = num_classes(job.data) if job.model.told == "classes" else 0
        self.names: tuple[CostName, ...] = ("flops", "params") if count is not None else ("flops",)
        self.bare = rootstock_cost(job.model, job.place(), job.codec.latent_channels(job.data), count or 0)
        solved, rules = job.solved(), zip(job.graft, job.rules(), strict=True)
        depth = job.model.depth
        made = [
            edit
            for number, (spec, rule) in enumerate(rules)
            if number not in solved
            for edit in rule[: spec.number(depth)]
        ]
        self.rootstock = self._cost([]).rootstock
        self.base = self._cost(made).graft
        self.changes = {edit: self._change(edit) for edit in job.candidates()}

    def _cost(self, edits: list[Edit]) -> GraftCost:
        return graft_cost(self.bare, edits, self.job.place(), self.carried)

    def _change(self, edit: Edit) -> Cost:
        return (cost := self._cost([edit])).graft - cost.rootstock


def _alone(job: JobSpec, solve: SolveSpec, formula: _Formula) -> Iterator[str]:
    """Yield a line for each limit that no choice meets, whatever the others say."""
    for name, limit in solve.limits.by_cost().items():
        if name not in formula.names:
            continue
        rootstock, base = getattr(formula.rootstock, name), getattr(formula.base, name)
        changes = {edit: float(getattr(change, name)) for edit, change in formula.changes.items()}
        least, most = (base + change for change in bounds(changes, job.model.depth))
        wanted_least, wanted_most = limit.bounds(name, rootstock)
        for end, is_met in (
            ("max", wanted_most is None or least <= wanted_most),
            ("min", wanted_least is None or most >= wanted_least),
        ):
            if not is_met:
                yield (
                    f"solve.limits.{name}.{end}: got {getattr(limit, end)}; accepted: what these edits can reach, "
                    f"{figure(name, least)} .. {figure(name, most)}, {least / rootstock:.1%} .. {most / rootstock:.1%} "
                    "of the rootstock's"
                )


def _together(spec: SolveSpec, formula: _Formula) -> list[str]:
    """Return a line if no choice meets all of the limits at once, or lies between the ends of one."""
    limits = {name: limit for name, limit in spec.limits.by_cost().items() if name in formula.names}
    if len(limits) < 2 and all(limit.min is None or limit.max is None for limit in limits.values()):
        return []
    from graftwork.models.selection.solver import Infeasible, Limit, Option, Problem, solve  # SciPy

    def costs(cost: Cost) -> dict[str, float]:
        return {name: float(getattr(cost, name)) for name in limits}

    options = tuple(
        Option(edit.name, frozenset(map(str, edit.places)), 0.0, costs(change))
        for edit, change in formula.changes.items()
    )
    rootstock = costs(formula.rootstock)
    wanted = {name: Limit(*limit.bounds(name, rootstock[name])) for name, limit in limits.items()}
    problem = Problem(options, costs(formula.base), {str(name): limit for name, limit in wanted.items()})
    try:
        solve(problem)
    except Infeasible:
        from graftwork.stages.selection.solving import unreachable

        return [f"solve.limits: {unreachable(problem, spec)}"]
    except RuntimeError:  # neither found nor ruled out in the time of a plan: `select` goes by scores
        return []
    return []
