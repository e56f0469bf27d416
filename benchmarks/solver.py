"""How long the solver takes to choose what each site holds, for models of 28 blocks and more.

    python -m benchmarks.solver [--plans 8] [--seeds 1] [--cases near same] [--no-plain] [--json FILE]

`28 x 2 x 5` are blocks, sites a block, and options a site with its original; +27 are pairs of blocks. Limits: at most a
share of the rootstock's FLOPs, parameters and latency, all three at once. Cases: what options cost is alike in each
block (as it is by formula, and where blocks of one shape are measured once), or the latency differs by 3%, or all costs
do; scores are random, or differ by 0.1%, or are what is saved but for 1%, which is the hardest.

`plain, s` is the first plan by the same program without counts, which Puzzle has and `milp` is asked for in the usual
way, with so many seconds at most. Both must come to the same score where both have a proof; `plain, gap` and `gap` are
what was not ruled out, over the score. Every limit is checked anew, in fractions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.command_line import parser
from benchmarks.report import show
from graftwork.models.selection.solver import Limit, Option, Problem, Solution, muted, solve

# By cost: what the original of a site costs, and the share of the rootstock that the graft may cost.
COSTS = {"flops": 2e9, "params": 5e6, "latency_ms": 0.7}
SHARES = {"flops": 0.7, "params": 0.72, "latency_ms": 0.75}
PLAIN_SECONDS = 30.0
AGREEMENT = 1e-6  # by which scores of both ways may differ, over the score: the tolerance of the usual way


@dataclass(frozen=True)
class Size:
    """How many blocks, sites a block and options a site, its original among them; with pairs of neighbours or not."""

    blocks: int
    targets: int
    options: int
    pairs: bool = False

    def __str__(self) -> str:
        return f"{self.blocks} x {self.targets} x {self.options}" + f" + {self.blocks - 1}" * self.pairs


@dataclass(frozen=True)
class Case:
    """How options differ from block to block: the standard deviation of a factor on their costs and scores."""

    costs: float = 0.0  # of all costs
    latency: float = 0.0
    scores: float = 0.5
    saving: bool = False  # scores are what is saved


CASES = {
    "alike": Case(),
    "near": Case(scores=1e-3),
    "same": Case(scores=0.0),
    "jitter": Case(latency=0.03),
    "random": Case(costs=0.5),
    "hardest": Case(scores=0.01, saving=True),
}
SIZES = (Size(28, 2, 5), Size(28, 2, 5, pairs=True), Size(57, 1, 12))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plans", type=int, default=8)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    arguments.add_argument("--no-plain", action="store_true", help="do not run the usual way beside it")
    asked = arguments.parse_args()
    plain_seconds = None if asked.no_plain else PLAIN_SECONDS
    rows = [*measured(SIZES, asked.cases, range(asked.seeds), asked.plans, plain_seconds)]
    show(f"{asked.plans} plans within {len(COSTS)} limits", rows, {}, asked.json)


def measured(
    sizes: Iterable[Size], cases: Sequence[str], seeds: Iterable[int], plans: int, plain_seconds: float | None
) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for size in sizes:
            for case in cases:
                yield row(size, case, seed, plans, plain_seconds)


def row(size: Size, case: str, seed: int, plans: int, plain_seconds: float | None) -> dict[str, Any]:
    """Solve one problem in both ways, and check that limits hold and scores agree."""
    problem = problem_of(size, CASES[case], seed)
    (best, *_), first, _ = timed(problem, 1)
    solutions, seconds, cpu_seconds = timed(problem, plans)
    names = {tuple(option.name for option in solution.chosen) for solution in solutions}
    assert len(names) == plans and solutions[0].score <= best.score
    assert all(within_limits(problem, solution.chosen) for solution in solutions)
    made = {
        "size": str(size),
        "case": case,
        "seconds": seconds,
        "CPU seconds": cpu_seconds,
        "gap": max(solution.gap / abs(solution.score) for solution in solutions),
        "first plan, s": first,
    }
    if plain_seconds is not None:
        start = time.perf_counter()
        score, gap = plain(problem, plain_seconds)
        made |= {"plain, s": time.perf_counter() - start, "plain, gap": gap}
        assert gap > 0 or best.gap > 0 or abs(score - best.score) <= AGREEMENT * abs(best.score), (score, best.score)
    return made


def timed(problem: Problem, plans: int) -> tuple[list[Solution], float, float]:
    """Return plans, seconds, and seconds of CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    solutions = solve(problem, plans)
    return solutions, time.perf_counter() - start, time.process_time() - cpu


def within_limits(problem: Problem, chosen: Sequence[Option]) -> bool:
    totals = {cost: sum(map(Fraction, (value, *changes(chosen, cost)))) for cost, value in problem.rootstock.items()}
    # A cost is a float: of a sum, the one that is nearest.
    return all(limit.most is None or float(totals[cost]) <= limit.most for cost, limit in problem.limits.items())


def changes(options: Sequence[Option], cost: str) -> list[float]:
    return [option.changes[cost] for option in options]


def plain(problem: Problem, seconds: float) -> tuple[float, float]:
    """Return the best score that `milp` finds in so many seconds in the usual way, and its gap over the score."""
    options = problem.options
    places = sorted(frozenset[str]().union(*(option.places for option in options)))
    filled = np.array([[place in option.places for option in options] for place in places], dtype=float)
    limits = [(cost, limit.most) for cost, limit in problem.limits.items() if limit.most is not None]
    shares = np.array([changes(options, cost) for cost, _ in limits]) / [
        [problem.rootstock[cost]] for cost, _ in limits
    ]
    most = [most / problem.rootstock[cost] - 1 for cost, most in limits]
    with muted():
        result = milp(
            [option.score for option in options],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(filled, -np.inf, 1), LinearConstraint(shares, -np.inf, most)],
            options={"mip_rel_gap": 0.0, "time_limit": seconds},
        )
    return (float(result.fun), float(result.mip_gap)) if result.x is not None else (np.inf, np.inf)


# -- what is solved


def problem_of(size: Size, case: Case, seed: int) -> Problem:
    """Return blocks of one shape, each of whose sites may hold operators that cost 10 to 90% of its original."""
    draws = random.Random(f"{size} {case} {seed}")
    targets = ("mha", "mlp")[: size.targets]
    kinds = {
        f"{target}.{number}": ({cost: draws.uniform(0.1, 0.9) for cost in COSTS}, draws.lognormvariate(0, 0.7))
        for target in targets
        for number in range(size.options - 1)
    }
    options = [
        option(f"{block:02}.{kind}", [f"{block:02}.{kind.partition('.')[0]}"], saved, score, case, draws)
        for block in range(size.blocks)
        for kind, (saved, score) in kinds.items()
    ]
    for first, second in pairwise(range(size.blocks) if size.pairs else ()):
        places = [f"{block:02}.{target}" for block in (first, second) for target in targets]
        saved = {cost: 0.3 * len(targets) for cost in COSTS}
        options.append(option(f"{first:02}.pair", places, saved, 1.5 * len(targets), case, draws))
    rootstock = {cost: size.blocks * size.targets * value * 1.1 for cost, value in COSTS.items()}
    limits = {cost: Limit(most=share * rootstock[cost]) for cost, share in SHARES.items()}
    return Problem(tuple(options), rootstock, limits)


def option(
    name: str, places: Sequence[str], saved: Mapping[str, float], score: float, case: Case, draws: random.Random
) -> Option:
    saved = {cost: share * draws.lognormvariate(0, case.costs) for cost, share in saved.items()}
    saved["latency_ms"] *= draws.lognormvariate(0, case.latency)
    score = (sum(saved.values()) if case.saving else score) * draws.lognormvariate(0, case.scores)
    # FLOPs and parameters are whole numbers.
    changes = {cost: -share * COSTS[cost] for cost, share in saved.items()}
    changes = {cost: float(round(change)) if COSTS[cost] > 1 else change for cost, change in changes.items()}
    return Option(name, frozenset(places), score, changes)


if __name__ == "__main__":
    main()
