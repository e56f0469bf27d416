"""Models put together from artifacts: the rootstock, its graft with distilled or fresh scions, the finetuned graft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from safetensors.torch import load_file

from graftwork.models import checkpoints
from graftwork.models.rootstocks import Rootstock
from graftwork.models.surgery import all_edits, graft, scion_at
from graftwork.specs.edits import Edit
from graftwork.specs.evaluate import Row
from graftwork.stages.artifacts.plan import read_plan
from graftwork.stages.artifacts.texts import told
from graftwork.stages.contract import Context, Input


def load_model(inputs: Mapping[str, Input], role: str, folder: str = ".") -> tuple[Rootstock, Sequence[Edit]]:
    """Return the model in a folder of the artifact that is needed as `role`, with the edits that it carries."""
    model, edits = checkpoints.load(inputs[role].path() / folder)
    return told(model, inputs), edits


def with_fresh_scions(context: Context, seed: int, plan: Sequence[Edit]) -> tuple[Rootstock, Sequence[Edit]]:
    """The rootstock with the plan's edits, initialised as they were before distillation."""
    model, edits = load_model(context.inputs, "base")
    return graft(model, plan, seed), all_edits(edits, plan)


def with_distilled_scions(context: Context, seed: int, plan: Sequence[Edit]) -> tuple[Rootstock, Sequence[Edit]]:
    """The graft after stage 1; or, where the step needs `searched`, what the search for layers trained."""
    start = "searched" in context.inputs
    model, edits = load_model(context.inputs, "searched", "hybrid") if start else load_model(context.inputs, "base")
    carried = {(edit.site, edit.operator) for edit in edits} if start else set()
    missing = [edit for edit in plan if (edit.site, edit.operator) not in carried]
    return with_scions(model, missing, context, seed), all_edits(edits, plan)


def with_scions(model: Rootstock, edits: Iterable[Edit], context: Context, seed: int) -> Rootstock:
    """Put the distilled scion of each edit into the model, in place; a pair's holds those of its blocks."""
    for edit in sorted(edits, key=Edit.sort_key):
        graft(model, [edit], seed)
        state = load_file(context.input(f"scions/{edit.name}") / "scion.safetensors")
        scion_at(model, edit.site).load_state_dict(state)
    return model


def row_model(context: Context, row: Row, seed: int) -> Rootstock:
    """The model that a row of the table is about."""
    if row == "rootstock":
        model, _ = load_model(context.inputs, "base")
    elif row == "stage1":
        model, _ = with_distilled_scions(context, seed, read_plan(context.input("select")))
    else:
        model, _ = load_model(context.inputs, f"finetuned/{row}")
    return model.eval()
