"""What each site of a model holds, so that the sum of scores is least and the whole model's costs are within limits.

    problem = Problem(options, rootstock={"flops": 1e13, "latency_ms": 80.0}, limits={"flops": Limit(most=7e12)})
    best, second = solve(problem, plans=2, apart=3)

A site holds its original, which scores and changes nothing, or an option that fills it. As in Puzzle (arXiv 2411.19146,
section 4) this is a mixed-integer program, solved by HiGHS through `scipy.optimize.milp`; x[i] is 1 if option i is
chosen:

    minimise    sum of score[i] x[i]
    so that     sum of x[i] over the options that fill a place <= 1              for each place
                least <= rootstock + sum of change[i] x[i] <= most               for each cost with a limit
                places in which what is held differs >= apart                    for each earlier plan

Two things are added:

- **Counts.** Blocks of one shape cost the same, so that very many choices differ in where an operator stands and in no
  cost. HiGHS would try them one by one when their scores are nearly equal. Options with the same changes therefore
  share an integer variable that counts how many of them are chosen, and limits are written in these counts. Once the
  counts are fixed, what is left is an assignment, whose linear relaxation has whole solutions.
- **Exact limits.** HiGHS lets a row be violated by 1e-6, and may miss a choice that is so near to a row. The row of a
  limit is therefore looser than the limit by more than that, and each choice is checked in exact arithmetic. If one
  violates a limit, that limit is written as rows of small integers (`_Program._digits`), and HiGHS solves again.

The same problem gives the same plans, also where HiGHS stops before it has a proof: a number of nodes decides that, not
the time. The order of the options does not decide between plans of equal scores; HiGHS does.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

# HiGHS stops when it is within 1e-6 of the optimum: 1e-12 of the largest score. Its linear programs are less accurate
# than that; in thousands of small problems plans were within 1e-9 of the largest score.
SCORE_SCALE = 1e6  # the largest coefficient of the objective
ROW_SCALE = 1e3  # the largest coefficient of an approximate row
ROW_MARGIN = 1e-5  # by which an approximate row is looser than its limit; HiGHS' tolerance is 1e-6
DIGIT_BASE = 2**10  # HiGHS takes 1 - 1e-6 for 1: a coefficient must be far below 1e6 for a row to be exact
MAX_NODES = 2000  # of a plan, to prove that it is the best: some ten seconds; more of them narrow the gap but slowly
MAX_SEARCH_NODES = 100_000  # of a plan, to find any choice at all
HIGHS_DEBUGGING = b"HighsMipSolverData::"  # how the lines begin that HiGHS 1.12 prints even if told to be silent

INFEASIBLE = 2  # a status of `milp`
STDOUT = 1
_muting = threading.Lock()  # the process has one stdout


class Infeasible(ValueError):
    """No choice meets the limits together."""


@dataclass(frozen=True)
class Option:
    """Something that can stand in one or several sites in place of their originals."""

    name: str  # unique among the options, such as "03.mha.1" or "02.pair"
    places: frozenset[str]  # the sites that it fills, such as {"03.mha"}; a pair fills all sites of both of its blocks
    score: float  # what choosing it adds to the error; may be negative
    changes: Mapping[str, float]  # what choosing it adds to each cost of the whole model; mostly negative


@dataclass(frozen=True)
class Limit:
    """What a cost of the whole model must come to."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        ends = {"at least": self.least, "at most": self.most}
        return " and ".join(f"{word} {end:.12g}" for word, end in ends.items() if end is not None) or "unlimited"


@dataclass(frozen=True)
class Problem:
    """Options of a model's sites, and limits on what the model may cost."""

    options: tuple[Option, ...]
    rootstock: Mapping[str, float]  # by cost, of the whole model with all its originals
    limits: Mapping[str, Limit]  # by cost; all of them hold


@dataclass(frozen=True)
class Solution:
    """A choice that meets the limits."""

    chosen: tuple[Option, ...]  # in the order of the problem's options; empty: the rootstock itself
    score: float
    costs: Mapping[str, float]  # by cost, of the whole model: the rootstock's and the changes, summed by math.fsum
    gap: float = 0.0  # by how much a lower score is not ruled out; 0: proven to be the best


def solve(problem: Problem, plans: int = 1, apart: int = 1, fixed: Collection[str] = ()) -> list[Solution]:
    """Return the best choice, and further ones that differ from it and from each other, best first.

    plans: how many; fewer are returned if no more exist.
    apart: in how many places, at least, a plan differs from every earlier one. A place differs if another option fills
        it, or if one of the two plans has the original there. A pair that fills 4 places counts as 4.
    fixed: names of options that must be chosen.

    Raises Infeasible if no choice meets the limits, ValueError if the problem is malformed. A limit holds for
    `Solution.costs`: what a plan costs can be the limit of another call.
    """
    for name, value in (("plans", plans), ("apart", apart)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; accepted: 1 or more")
    _check(problem, fixed)
    program = _Program(problem, [option.score for option in problem.options], problem.limits, fixed)
    solutions: list[Solution] = []
    while len(solutions) < plans and (best := program.minimum()) is not None:
        solutions.append(_solution(problem, *best))
        program.keep_away(best[0], apart)
    if not solutions:
        raise Infeasible(_conflict(problem, problem.limits, fixed))
    return sorted(solutions, key=lambda solution: solution.score)


def reachable(problem: Problem, cost: str) -> tuple[float, float]:
    """Return the least and the most of a cost that choices come to if all other limits hold.

    Both are costs of real choices, so that each can be a limit. Where HiGHS stops before a proof, which several other
    limits may cause, a little more may be reachable. Raises Infeasible if no choice meets the other limits, ValueError
    if the problem is malformed.
    """
    _check(problem, ())
    if cost not in problem.rootstock:
        raise ValueError(f"cost: got {cost!r}; accepted: {', '.join(problem.rootstock)}")
    others = {name: limit for name, limit in problem.limits.items() if name != cost}
    ends = _ends(problem, cost, others, ())
    if ends is None:
        raise Infeasible(_conflict(problem, others, ()))
    return ends


def _ends(
    problem: Problem, cost: str, limits: Mapping[str, Limit], fixed: Collection[str]
) -> tuple[float, float] | None:
    """Return the least and the most of a cost within limits; None if no choice meets them."""
    ends = []
    for sign in (1, -1):
        objective = [sign * option.changes[cost] for option in problem.options]
        best = _Program(problem, objective, limits, fixed).minimum()
        if best is None:
            return None
        ends.append(_solution(problem, *best).costs[cost])
    return ends[0], ends[1]


def _solution(problem: Problem, chosen: Collection[int], gap: float) -> Solution:
    options = tuple(problem.options[i] for i in sorted(chosen))
    costs = {
        name: math.fsum([value, *(option.changes[name] for option in options)])
        for name, value in problem.rootstock.items()
    }
    return Solution(options, math.fsum(option.score for option in options), costs, gap)


def _check(problem: Problem, fixed: Collection[str]) -> None:
    """Raise ValueError if the problem is malformed."""
    names: set[str] = set()
    for option in problem.options:
        if option.name in names:
            raise ValueError(f"options: got two with the name {option.name!r}; accepted: a name of its own for each")
        names.add(option.name)
        if not option.places:
            raise ValueError(f"option {option.name!r}, places: got none; accepted: one or more")
        _check_finite(option.score, f"option {option.name!r}, score")
        for cost in problem.rootstock:
            if cost not in option.changes:
                raise ValueError(
                    f"option {option.name!r}, changes: got no {cost!r}; accepted: each cost of the rootstock"
                )
            _check_finite(option.changes[cost], f"option {option.name!r}, change of {cost!r}")
    for cost, value in problem.rootstock.items():
        _check_finite(value, f"rootstock, {cost!r}")
    for cost, limit in problem.limits.items():
        if cost not in problem.rootstock:
            raise ValueError(f"limits: got {cost!r}; accepted: {', '.join(problem.rootstock)}")
        for end in (limit.least, limit.most):
            _check_finite(0.0 if end is None else end, f"limits, {cost!r}")
    if unknown := sorted({*fixed} - names):
        raise ValueError(f"fixed: got {', '.join(unknown)}; accepted: names of the options")


def _check_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}; accepted: a finite number")


def _conflict(problem: Problem, limits: Mapping[str, Limit], fixed: Collection[str]) -> str:
    """Say what cannot be met, and what each cost comes to if no other has a limit."""
    parts = []
    for cost, limit in limits.items():
        ends = _ends(problem, cost, {}, fixed)
        if ends is None:
            break
        parts.append(f"{cost} {limit} ({ends[0]:.12g} to {ends[1]:.12g} without other limits)")
    if len(parts) < len(limits) or not limits:
        return f"fixed: got {', '.join(sorted(fixed))}; two of them fill one place"
    return f"no choice meets the limits together: {', '.join(parts)}"


# -- limits in integers


@dataclass
class _Side:
    """One side of a limit: the sum of units[i] over the chosen options is at most `most`, in exact integers."""

    units: Sequence[int]
    columns: Sequence[int]  # by option, the column of the program that has its change
    most: int
    exact: bool = False  # whether its rows are exact
    rows: list[_Row] = field(default_factory=list)

    def holds(self, chosen: Collection[int]) -> bool:
        return sum(self.units[i] for i in chosen) <= self.most

    @property
    def largest(self) -> int:
        return max(map(abs, self.units), default=0)


def _sides(rootstock: float, changes: Sequence[float], columns: Sequence[int], limit: Limit) -> Iterator[_Side]:
    """Yield the sides of a limit, in the largest unit of which all changes are multiples."""
    exact = [Fraction(change) for change in changes]
    denominator = math.lcm(*(change.denominator for change in exact))
    numerators = [int(change * denominator) for change in exact]
    divisor = math.gcd(*numerators) or 1
    units, unit = [numerator // divisor for numerator in numerators], Fraction(divisor, denominator)
    if limit.most is not None:
        yield _Side(units, columns, _multiples(limit.most, rootstock, unit))
    if limit.least is not None:
        yield _Side([-number for number in units], columns, _multiples(-limit.least, -rootstock, unit))


def _multiples(limit: float, start: float, unit: Fraction) -> int:
    """Return the largest n for which start + n * unit, rounded to a float, is at most the limit."""
    # Up to half of the way to the next float sums are rounded to the limit; a sum just there goes to the even one.
    halfway = (Fraction(limit) + Fraction(math.nextafter(limit, math.inf))) / 2
    n = math.floor((halfway - Fraction(start)) / unit)
    return n if float(Fraction(start) + n * unit) <= limit else n - 1


# -- the mixed-integer program


@dataclass(frozen=True)
class _Row:
    """least <= sum of coefficients[column] * variable[column] <= most."""

    coefficients: Mapping[int, float]
    least: float = -math.inf
    most: float = math.inf


class _Program:
    """The least sum of an objective over the choices that meet limits, have the fixed options, keep away from plans.

    Columns are integer variables from 0 to `upper`: one for each option, then the counts, then carries of digits.
    """

    def __init__(
        self, problem: Problem, objective: Sequence[float], limits: Mapping[str, Limit], fixed: Collection[str]
    ) -> None:
        self.options = problem.options
        self.largest = max(map(abs, objective), default=0.0) or 1.0
        self.objective = [value / self.largest * SCORE_SCALE for value in objective]
        self.upper = [1] * len(self.options)
        self.rows: list[_Row] = []
        for place in sorted(frozenset[str]().union(*(option.places for option in self.options))):
            self.rows.append(_Row({i: 1 for i, option in enumerate(self.options) if place in option.places}, most=1))
        self.rows += [_Row({i: 1}, least=1) for i, option in enumerate(self.options) if option.name in fixed]
        self.counts: dict[tuple[int, ...], int] = {}  # columns, by the options that are counted
        self.sides: list[_Side] = []
        for cost, limit in limits.items():
            changes = [option.changes[cost] for option in self.options]
            self.sides += _sides(problem.rootstock[cost], changes, self._counted(changes), limit)
        for side in self.sides:
            if side.largest <= DIGIT_BASE:
                self._make_exact(side)
            else:
                side.rows = [self._approximate(side)]

    def minimum(self) -> tuple[frozenset[int], float] | None:
        """Return the best choice, as indices of options, and its gap; None if there is no choice."""
        if not self.options:
            rows = [*self.rows, *(row for side in self.sides for row in side.rows)]
            return (frozenset(), 0.0) if all(row.least <= 0 <= row.most for row in rows) else None
        while True:
            result = self._highs()
            if result.x is None and result.status == INFEASIBLE:
                return None
            if result.x is None:
                doubtful = [side for side in self.sides if not side.exact]
            else:
                chosen = frozenset(i for i in range(len(self.options)) if result.x[i] > 0.5)
                doubtful = [side for side in self.sides if not side.holds(chosen)]
                if not doubtful:
                    gap = 0.0 if result.success else (result.fun - result.mip_dual_bound) * self.largest / SCORE_SCALE
                    return chosen, max(gap, 0.0)
            blunt = [side for side in doubtful if not side.exact]
            for side in blunt:
                self._make_exact(side)
            if not blunt and result.x is None:
                raise RuntimeError(f"HiGHS found no choice and ruled none out ({result.message}); widen the limits")
            if not blunt:  # it took a row of integers for met that is not
                self.keep_away(chosen, 1)

    def keep_away(self, chosen: Collection[int], apart: int) -> None:
        """Demand at least `apart` places in which what is held differs from this choice.

        Alike are a place that the choice fills, if the same option is chosen again, and one that holds the original, if
        no option fills it.
        """
        filled = frozenset[str]().union(*(self.options[i].places for i in chosen))
        alike = {
            i: len(option.places) if i in chosen else -len(option.places - filled)
            for i, option in enumerate(self.options)
        }
        self.rows.append(_Row(alike, most=len(filled) - apart))

    def _counted(self, changes: Sequence[float]) -> list[int]:
        """Return by option the column of its change: a count of all with the same change, or its own if it is alone."""
        alike: dict[float, list[int]] = {}
        for i, change in enumerate(changes):
            alike.setdefault(change, []).append(i)
        columns = [*range(len(changes))]
        for members in map(tuple, alike.values()):
            if len(members) > 1 and members not in self.counts:
                self.counts[members] = self._column(len(members))
                self.rows.append(_Row({self.counts[members]: -1, **dict.fromkeys(members, 1)}, 0, 0))
            for i in members:
                columns[i] = self.counts.get(members, i)
        return columns

    def _column(self, upper: int) -> int:
        self.upper.append(upper)
        return len(self.upper) - 1

    def _approximate(self, side: _Side) -> _Row:
        scale = Fraction(ROW_SCALE) / side.largest
        row = {column: float(number * scale) for column, number in self._units(side).items()}
        return _Row(row, most=float(self._clipped(side) * scale) + ROW_MARGIN)

    def _make_exact(self, side: _Side) -> None:
        side.exact = True
        side.rows = [*self._digits(side)]

    def _digits(self, side: _Side) -> Iterator[_Row]:
        """Yield rows of small integers that hold together just if the side does, with a carry from each to the next.

        For two digits, units = high * B + low and most = M * B + m, there is an integer carry with

            sum of low x <= m + B * carry     and     sum of high x + carry <= M

        just if sum of low x - m <= B * (M - sum of high x), which is the side itself. All is whole: half of a unit on
        top of a row changes nothing and is far more than what HiGHS tolerates.
        """
        units, most, carry = self._units(side), self._clipped(side), dict[int, int]()
        while max(map(abs, units.values()), default=0) > DIGIT_BASE:
            low = {column: number % DIGIT_BASE for column, number in units.items()}
            out = self._column(len(self.options) + 1)
            yield _Row({**low, **carry, out: -DIGIT_BASE}, most=most % DIGIT_BASE + 0.5)
            units = {column: number // DIGIT_BASE for column, number in units.items()}
            most, carry = most // DIGIT_BASE, {out: 1}
        yield _Row({**units, **carry}, most=most + 0.5)

    def _units(self, side: _Side) -> dict[int, int]:
        return dict(zip(side.columns, side.units, strict=True))

    def _clipped(self, side: _Side) -> int:
        """Return the side's `most`, or the nearest number that as surely holds, or fails, whatever is chosen."""
        least, most = (sum(number for number in side.units if number * sign > 0) for sign in (-1, 1))
        return min(max(side.most, least - 1), most)

    def _highs(self) -> Any:
        """Return the result of HiGHS for the rows as they are."""
        rows = [*self.rows, *(row for side in self.sides for row in side.rows)]
        entries = [(r, column, value) for r, row in enumerate(rows) for column, value in row.coefficients.items()]
        at_row, at_column, values = zip(*entries, strict=True)
        matrix = coo_array((values, (at_row, at_column)), shape=(len(rows), len(self.upper)), dtype=float)
        objective = np.zeros(len(self.upper))
        objective[: len(self.options)] = self.objective
        ask = partial(
            milp,
            objective,
            integrality=np.ones(len(self.upper)),
            bounds=Bounds(0, self.upper),
            constraints=LinearConstraint(matrix.tocsc(), [row.least for row in rows], [row.most for row in rows]),
        )
        with muted():
            result = ask(options={"mip_rel_gap": 0.0, "node_limit": MAX_NODES})
            if result.x is None and result.status != INFEASIBLE:  # it came upon none
                result = ask(options={"mip_rel_gap": 0.0, "node_limit": MAX_SEARCH_NODES})
        return result


@contextmanager
def muted() -> Iterator[None]:
    """Keep HiGHS' debugging lines from this process's stdout; what else is printed meanwhile comes afterwards.

    HiGHS prints by C's printf, which `contextlib.redirect_stdout` does not see (HiGHS issue 2783).
    """
    c = ctypes.CDLL(None)
    with _muting, tempfile.TemporaryFile() as printed:
        c.fflush(None)
        stdout = os.dup(STDOUT)
        try:
            os.dup2(printed.fileno(), STDOUT)
            yield
        finally:
            c.fflush(None)
            os.dup2(stdout, STDOUT)
            os.close(stdout)
            printed.seek(0)
            for line in printed:
                if not line.startswith(HIGHS_DEBUGGING):
                    os.write(STDOUT, line)
