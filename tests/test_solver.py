"""What each site holds: the best of all choices within the limits, as enumeration finds it, and no limit violated."""

from __future__ import annotations

import ctypes
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from graftwork.models.selection import solver
from graftwork.models.selection.solver import Infeasible, Limit, Option, Problem, Solution, reachable, solve

TARGETS = ("mha", "mlp")
COSTS = ("flops", "params", "latency_ms")
CLOSE = 1e-9  # of the largest score: within what a plan is the best


def option(name: str, score: float, **changes: float) -> Option:
    """Return an option that fills the site of its name: 03.mha if that is 03.mha.1."""
    return Option(name, frozenset([name.rpartition(".")[0]]), score, changes)


# What options change, by the kind of numbers: whole, of any size, as FLOPs of a large model, alike in each block.
NUMBERS = {
    "whole": lambda draws, _: float(draws.randint(-9, 3)),
    "any": lambda draws, _: draws.uniform(-1, 0.2) * 10 ** draws.randint(-6, 0),
    "large": lambda draws, _: float(draws.choice((-37 * 10**12 - 1, -5 * 10**12, -(10**9), -(10**9) - 1, 7))),
    "alike": lambda draws, kind: round(random.Random(kind).uniform(-1, 0.2), 2),
}
SCORES = {
    "any": lambda draws: draws.uniform(-1, 2),
    "nearly equal": lambda draws: 1 + 1e-6 * draws.random(),
    "whole": lambda draws: float(draws.randint(-2, 3)),
}


def drawn(seed: int) -> Problem:
    """Return up to 3 blocks with up to 3 options a site, pairs, and limits at what choices cost or just beside it."""
    draws = random.Random(seed)
    numbers, scores = draws.choice([*NUMBERS.values()]), draws.choice([*SCORES.values()])
    costs, targets, blocks = COSTS[: draws.randint(1, 3)], TARGETS[: draws.randint(1, 2)], range(draws.randint(1, 3))

    def made(name: str, kind: str, places: Sequence[str]) -> Option:
        changes = {cost: numbers(draws, f"{kind} {cost}") for cost in costs}
        return Option(name, frozenset(places), scores(draws), changes)

    sites = [(f"{block}.{target}", target) for block in blocks for target in targets]
    options = [
        made(f"{site}.{number}", f"{target} {number}", [site])
        for site, target in sites
        for number in range(draws.randint(0, 3))
    ]
    for first, second in pairwise(blocks):
        if draws.random() < 0.4:
            places = [f"{block}.{target}" for block in (first, second) for target in targets]
            options.append(made(f"{first}.pair", "pair", places))
    free = Problem(tuple(options), {cost: draws.choice((9.3, 1e14)) for cost in costs}, {})
    choices = [*every_choice(free)]
    limits = {cost: drawn_limit(draws, sorted({choice.costs[cost] for choice in choices})) for cost in costs}
    return replace(free, limits=limits)


def drawn_limit(draws: random.Random, reached: Sequence[float]) -> Limit:
    low, high = sorted(draws.choices(reached, k=2))
    least = draws.choice((None, low, low, math.nextafter(low, math.inf)))
    most = draws.choice((None, high, high, math.nextafter(high, -math.inf), draws.uniform(reached[0], reached[-1])))
    return Limit(least, most)


def every_choice(problem: Problem, start: int = 0, chosen: tuple[Option, ...] = ()) -> Iterator[Solution]:
    if start == len(problem.options):
        yield solution_of(problem, chosen)
        return
    yield from every_choice(problem, start + 1, chosen)
    if not any(problem.options[start].places & other.places for other in chosen):
        yield from every_choice(problem, start + 1, (*chosen, problem.options[start]))


def solution_of(problem: Problem, chosen: tuple[Option, ...]) -> Solution:
    costs = {
        cost: math.fsum([value, *(option.changes[cost] for option in chosen)])
        for cost, value in problem.rootstock.items()
    }
    return Solution(chosen, math.fsum(option.score for option in chosen), costs)


def meets(costs: Mapping[str, float], limits: Mapping[str, Limit]) -> bool:
    return all(
        (limit.least is None or costs[cost] >= limit.least) and (limit.most is None or costs[cost] <= limit.most)
        for cost, limit in limits.items()
    )


def num_apart(problem: Problem, one: Solution, other: Solution) -> int:
    """Return in how many places two plans differ."""
    places = frozenset[str]().union(*(option.places for option in problem.options))
    return sum(holder(one, place) != holder(other, place) for place in places)


def holder(plan: Solution, place: str) -> str | None:
    return next((option.name for option in plan.chosen if place in option.places), None)


def test_plans_are_the_best_that_enumeration_finds() -> None:
    for seed in range(100):
        problem, apart = drawn(seed), 1 + seed % 3
        left = [choice for choice in every_choice(problem) if meets(choice.costs, problem.limits)]
        if not left:
            with pytest.raises(Infeasible, match="no choice meets the limits together"):
                solve(problem)
            continue
        close = CLOSE * max((abs(option.score) for option in problem.options), default=0.0)
        plans = solve(problem, plans=3, apart=apart)
        for plan in plans:
            assert plan in left, f"{seed}: a limit is violated, or an earlier plan is near"
            assert plan.score <= min(choice.score for choice in left) + close, seed
            left = [choice for choice in left if num_apart(problem, choice, plan) >= apart]
        assert len(plans) == 3 or not left, seed
        assert [plan.score for plan in plans] == sorted(plan.score for plan in plans)


def test_fixed_options_are_chosen_and_the_rest_is_the_best_beside_them() -> None:
    for seed in range(20):
        problem = replace(drawn(seed), limits={})
        for one in problem.options[:2]:
            plan = solve(problem, fixed={one.name})[0]
            choices = [choice.score for choice in every_choice(problem) if one in choice.chosen]
            assert one in plan.chosen and plan.score == pytest.approx(min(choices), abs=1e-9)


def test_reachable_is_what_choices_within_the_other_limits_cost() -> None:
    for seed in range(40):
        problem = drawn(seed)
        others = {cost: limit for cost, limit in problem.limits.items() if cost != "flops"}
        costs = [choice.costs["flops"] for choice in every_choice(problem) if meets(choice.costs, others)]
        if not costs:
            with pytest.raises(Infeasible):
                reachable(problem, "flops")
            continue
        close = CLOSE * max((abs(option.changes["flops"]) for option in problem.options), default=0.0)
        least, most = reachable(problem, "flops")
        assert {least, most} <= {*costs}
        assert least <= min(costs) + close and most >= max(costs) - close


def within(options: Sequence[Option], rootstock: float, share: float) -> Problem:
    """Return a problem whose costs may all be that share of the rootstock's at most."""
    costs = dict.fromkeys(options[0].changes, rootstock)
    return Problem(tuple(options), costs, dict.fromkeys(costs, Limit(most=share * rootstock)))


def large(limit: float) -> Problem:
    """Return 20 sites in a model of 1e14 FLOPs, with options that save 1e9, one FLOP more than that, or very much."""
    options = [
        option(f"{block:02}.mha.{number}", score + block, flops=-float(saved))
        for block in range(20)
        for number, (score, saved) in enumerate([(1, 10**9), (1.1, 10**9 + 1), (9, 4 * 10**12 + 1 + block)])
    ]
    return Problem(tuple(options), {"flops": 1e14}, {"flops": Limit(most=limit)})


@pytest.mark.parametrize(("limit", "best"), [(1e14 - 1e9, "00.mha.0"), (1e14 - 1e9 - 1, "00.mha.1")])
def test_a_limit_among_large_numbers_is_attained_and_kept_to_the_unit(limit: float, best: str) -> None:
    plan = solve(large(limit))[0]
    assert [one.name for one in plan.chosen] == [best]
    assert plan.costs["flops"] == sum(map(Fraction, (1e14, plan.chosen[0].changes["flops"]))) == limit


def test_a_choice_that_highs_lets_through_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "DIGIT_BASE", 2**70)  # integers that HiGHS cannot tell apart
    assert [one.name for one in solve(large(1e14 - 1e9 - 1))[0].chosen] == ["00.mha.1"]


def test_what_a_plan_costs_can_be_the_limit_of_another_call() -> None:
    draws = random.Random(7)
    for _ in range(10):
        options = [option(f"{i}.mha.0", draws.random(), **{cost: -draws.random() for cost in COSTS}) for i in range(12)]
        free = Problem(tuple(options), dict.fromkeys(COSTS, 12.1), {})
        costs = solution_of(free, tuple(draws.sample(options, 6))).costs
        exactly = {cost: Limit(value, value) for cost, value in costs.items()}
        assert solve(replace(free, limits=exactly))[0].costs == costs


def alike_blocks(num_blocks: int) -> Problem:
    """Return blocks whose options cost the same in each, with scores that are nearly the same."""
    draws = random.Random(0)
    kinds = [(draws.lognormvariate(0, 0.7), {cost: -draws.uniform(0.1, 1) for cost in COSTS}) for _ in range(8)]
    options = [
        option(f"{block:02}.{target}.{n}", score * (1 + 1e-4 * draws.random()), **changes)
        for block in range(num_blocks)
        for target, four in zip(TARGETS, (kinds[:4], kinds[4:]), strict=True)
        for n, (score, changes) in enumerate(four)
    ]
    return within(options, 2.0 * num_blocks, 0.65)


def test_blocks_that_are_alike_need_few_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MAX_NODES", 100)
    assert [plan.gap for plan in solve(alike_blocks(28), plans=2)] == [0.0, 0.0]


def test_the_same_problem_has_the_same_plans() -> None:
    problem = alike_blocks(8)
    assert solve(problem, plans=3, apart=2) == solve(problem, plans=3, apart=2)


def test_a_gap_is_told_if_highs_stops_before_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(1)
    options = []
    for i in range(5 * 4):
        changes = {cost: -draws.uniform(0.05, 1) for cost in COSTS}
        score = draws.gauss(0, 0.05) - sum(changes.values())
        options.append(option(f"{i // 4}.mha.{i}", score, **changes))
    problem = within(options, 5.0, 0.6)
    best = solve(problem)[0]
    monkeypatch.setattr(solver, "MAX_NODES", 2)
    early = solve(problem)[0]
    assert best.gap == 0 < early.gap
    assert best.score <= early.score <= best.score + early.gap
    assert meets(early.costs, problem.limits)


def test_fewer_plans_are_returned_if_no_more_exist() -> None:
    options = (option("0.mha.0", -1.0), option("0.mha.1", 1.0), option("1.mha.0", -2.0))
    assert [plan.score for plan in solve(Problem(options, {}, {}), plans=99)] == [-3, -2, -1, -1, 0, 1]


def test_a_model_without_options_is_its_rootstock() -> None:
    rootstock = Problem((), {"flops": 3.0}, {"flops": Limit(3.0, 3.0)})
    assert solve(rootstock, plans=2) == [Solution((), 0.0, {"flops": 3.0})]
    assert reachable(rootstock, "flops") == (3.0, 3.0)
    with pytest.raises(Infeasible):
        solve(replace(rootstock, limits={"flops": Limit(most=2.0)}))


def test_what_cannot_be_met_is_told_with_what_each_cost_could_come_to() -> None:
    options = (option("0.mha.0", 1.0, flops=-2.0, params=1.0), option("1.mha.0", 1.0, flops=-3.0, params=2.0))
    problem = Problem(options, {"flops": 9.0, "params": 9.0}, {"flops": Limit(most=6.0), "params": Limit(most=10.0)})
    told = r"flops at most 6 \(4 to 9 without other limits\), params at most 10 \(9 to 12 without other limits\)"
    with pytest.raises(Infeasible, match=told):
        solve(problem)
    with pytest.raises(Infeasible, match=r"fixed: got 0\.mha\.0, 0\.mha\.1; two of them fill one place"):
        solve(Problem((option("0.mha.0", 1.0), option("0.mha.1", 1.0)), {}, {}), fixed=["0.mha.1", "0.mha.0"])


ONE = option("0.mha.0", 1.0, flops=-1.0)
MALFORMED = {
    "0.mha.0.*score.*nan": Problem((replace(ONE, score=math.nan),), {}, {}),
    "0.mha.0.*score.*inf": Problem((replace(ONE, score=math.inf),), {}, {}),
    "0.mha.0.*flops.*inf": Problem((replace(ONE, changes={"flops": -math.inf}),), {"flops": 1.0}, {}),
    "0.mha.0.*params": Problem((ONE,), {"flops": 1.0, "params": 1.0}, {}),
    "options: .*0.mha.0": Problem((ONE, ONE), {}, {}),
    "0.mha.0.*places": Problem((replace(ONE, places=frozenset()),), {}, {}),
    "rootstock.*flops.*nan": Problem((ONE,), {"flops": math.nan}, {}),
    "limits.*params.*accepted: flops": Problem((ONE,), {"flops": 1.0}, {"params": Limit(most=1.0)}),
    "limits.*flops.*nan": Problem((ONE,), {"flops": 1.0}, {"flops": Limit(most=math.nan)}),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_problem_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(MALFORMED[message])


def test_calls_that_make_no_sense_are_refused() -> None:
    problem = Problem((ONE,), {"flops": 1.0}, {})
    with pytest.raises(ValueError, match=r"fixed: got 1\.mha"):
        solve(problem, fixed=["1.mha"])
    with pytest.raises(ValueError, match="apart: got 0"):
        solve(problem, apart=0)
    with pytest.raises(ValueError, match="plans: got 0"):
        solve(problem, plans=0)
    with pytest.raises(ValueError, match="got 'params'; accepted: flops"):
        reachable(problem, "params")


def test_what_highs_prints_for_debugging_is_dropped_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    with solver.muted():
        c.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        c.printf(b"of another thread\n")
    os.write(1, b"afterwards\n")
    assert capfd.readouterr().out == "of another thread\nafterwards\n"


def test_models_load_without_scipy() -> None:
    """A plan and most of a job's steps need no solver."""
    code = "import sys, graftwork.models.selection; sys.exit('scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
