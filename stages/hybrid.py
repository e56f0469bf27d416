"""Models put together from artifacts: the rootstock, its graft with distilled or fresh scions, the finetuned graft."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load_file

from models import checkpoints
from models.dit import DiT
from models.surgery import graft, operator_at
from specs.graft import Edit
from specs.steps import Row
from stages import Context
from stages.select import read_plan


def with_fresh_scions(context: Context, seed: int) -> tuple[DiT, Sequence[Edit]]:
    """The rootstock with the plan's operators, initialised as they were before distillation."""
    model, edits = checkpoints.load(context.input("base"))
    plan = read_plan(context.input("select"))
    return graft(model, plan, seed), (*edits, *plan)


def with_distilled_scions(context: Context, seed: int) -> tuple[DiT, Sequence[Edit]]:
    """The graft after stage 1."""
    model, edits = with_fresh_scions(context, seed)
    for edit in read_plan(context.input("select")):
        scion = load_file(context.input(f"scions/{edit.site}") / "scion.safetensors")
        operator_at(model, edit.site).load_state_dict(scion)
    return model, edits


def row_model(context: Context, row: Row, seed: int) -> DiT:
    """The model that a row of the table is about."""
    if row == "rootstock":
        model, _ = checkpoints.load(context.input("base"))
    elif row == "stage1":
        model, _ = with_distilled_scions(context, seed)
    else:
        model, _ = checkpoints.load(context.input(f"finetuned/{row}"))
    return model.eval()
