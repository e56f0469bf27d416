"""The plan of edits, `plan.json`: which site gets which operator, with score and reason; and a solver's other plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from graftwork.specs.edits import Edit

SOLUTIONS, FINALISTS = "solutions.json", "finalists.json"


class ChosenEdit(BaseModel):
    """One edit of the plan."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")  # as of `evidence.Distilled`
    edit: Edit
    reason: str
    score: float  # what the strategy went by; of a static one, the relative error
    score_is: str
    heldout_error: float
    relative_error: float


class SolvedPlan(BaseModel):
    """One of a solver's plans, with what it should come to."""

    model_config = ConfigDict(frozen=True)
    edits: tuple[ChosenEdit, ...]  # in the order in which they are made; those of other strategies among them
    solved: tuple[str, ...]  # names of those that the solver chose
    scoring: str  # none: of scores of candidates alone; greedy: of scores beside what was chosen before
    error: float  # the sum of scores
    costs: Mapping[str, float]  # of the whole model
    gap: float = 0.0  # by which the sum may be above the least one, if the solver gave up


_PLAN = TypeAdapter(tuple[ChosenEdit, ...])
_SOLUTIONS = TypeAdapter(tuple[SolvedPlan, ...])


def write_plan(folder: Path, plan: Sequence[ChosenEdit]) -> None:
    (folder / "plan.json").write_bytes(_PLAN.dump_json(tuple(plan), indent=1))


def read_plan(folder: Path, number: int | None = None) -> tuple[Edit, ...]:
    """The edits of a plan, in the order in which they are made. number: of a solver's plans, counted from 0."""
    if number is not None:
        return tuple(chosen.edit for chosen in read_solutions(folder)[number].edits)
    return tuple(chosen.edit for chosen in _PLAN.validate_json((folder / "plan.json").read_bytes()))


class Decided(BaseModel):
    """Which of a solver's plans goes on, by what it came to after a short finetune; `finalists.json`."""

    model_config = ConfigDict(frozen=True)
    plan: int  # counted from 0
    by: str
    figures: Mapping[str, float]  # of each finalist, by its row


def write_decided(folder: Path, decided: Decided) -> None:
    (folder / FINALISTS).write_text(decided.model_dump_json(indent=1))


def read_decided(folder: Path) -> int:
    """Return which of a solver's plans a selection is, counted from 0: its best one unless finalists decided."""
    path = folder / FINALISTS
    return Decided.model_validate_json(path.read_bytes()).plan if path.exists() else 0


def write_solutions(folder: Path, plans: Sequence[SolvedPlan]) -> None:
    (folder / SOLUTIONS).write_bytes(_SOLUTIONS.dump_json(tuple(plans), indent=1))


def read_solutions(folder: Path) -> tuple[SolvedPlan, ...]:
    """Return a solver's plans, the best first."""
    return _SOLUTIONS.validate_json((folder / SOLUTIONS).read_bytes())
