"""The plan of edits, `plan.json`: which site gets which operator, with score and reason."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from graftwork.specs.edits import Edit


class ChosenEdit(BaseModel):
    """One edit of the plan."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")  # as of `evidence.Distilled`
    edit: Edit
    reason: str
    score: float  # what the strategy went by; of a static one, the relative error
    score_is: str
    heldout_error: float
    relative_error: float


_PLAN = TypeAdapter(tuple[ChosenEdit, ...])


def read_plan(folder: Path) -> tuple[Edit, ...]:
    """The edits of a plan, in the order in which they are made."""
    return tuple(chosen.edit for chosen in _PLAN.validate_json((folder / "plan.json").read_bytes()))
