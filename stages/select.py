"""`select`: the plan of edits, with each edit's reason and evidence. Leaves `plan.json`, which finetune reads."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from specs.graft import Edit
from specs.steps import SelectParams
from stages import Context


class ChosenEdit(BaseModel):
    """One edit of the plan."""

    model_config = ConfigDict(frozen=True)
    edit: Edit
    reason: str
    heldout_error: float
    relative_error: float


_PLAN = TypeAdapter(tuple[ChosenEdit, ...])


def run(context: Context) -> None:
    params: SelectParams = context.params
    plan = []
    for choice in params.choices:
        evidence = json.loads((context.input(f"scions/{choice.edit.site}") / "distill.json").read_text())
        plan.append(
            ChosenEdit(
                edit=choice.edit,
                reason=choice.reason,
                heldout_error=evidence["heldout_error"],
                relative_error=evidence["relative_error"],
            )
        )
        context.report(len(plan), len(params.choices))
    (context.out / "plan.json").write_bytes(_PLAN.dump_json(tuple(plan), indent=1))


def read_plan(folder: Path) -> tuple[Edit, ...]:
    """The edits of a plan, in the order of their sites."""
    return tuple(chosen.edit for chosen in _PLAN.validate_json((folder / "plan.json").read_bytes()))
