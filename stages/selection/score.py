"""`score`: how much the whole model's output changes with one candidate alone in the rootstock. Leaves `score.json`.

The candidates of a task share the rootstock's pass. See `replacement` for what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graftwork.specs.solve import ScoreSpec
from graftwork.stages.artifacts.evidence import write_scored
from graftwork.stages.artifacts.hybrids import load_model
from graftwork.stages.artifacts.latents import read
from graftwork.stages.catalog.score import ScoreParams
from graftwork.stages.contract import Context
from graftwork.stages.distillation.sources import memory_share
from graftwork.stages.selection.replacement import Replacements, drawn, read_scion

TASK_STATE = "replacements"  # the name under which a task keeps its state from step to step


@dataclass(frozen=True)
class TaskState:
    """What the candidates of one task share."""

    identity: tuple[object, ...]
    replacements: Replacements


def run(context: Context) -> None:
    params: ScoreParams = context.params
    replacements = _task_state(context).replacements
    scion = read_scion(replacements.model, params.edit, context.input("scion"), params.seed, context.device)
    scored = replacements.score({params.edit: scion})
    context.report(1, 1, {"output": scored.output, "loss": scored.loss})
    write_scored(context.out, scored)


def _task_state(context: Context) -> TaskState:
    """Return the state of the step's task; the first step of the task makes it."""
    params: ScoreParams = context.params
    identity = (context.inputs["base"].key, context.inputs["features"].key, params.seed, params.recipe)
    state: TaskState | None = context.task_scope.state.get(TASK_STATE)
    if state is None or state.identity != identity:
        ahead = [other.edit.site.block for other in (params, *context.task_scope.next)]
        state = TaskState(identity, replacements_of(context, params.recipe, params.seed, ahead))
        context.task_scope.state[TASK_STATE] = state
    return state


def replacements_of(
    context: Context, recipe: ScoreSpec, seed: int, begins: Iterable[int] | None = None
) -> Replacements:
    """Return the rootstock of a step on the samples that its job scores by.

    begins: the blocks where scions will begin; all of them unless given.
    """
    model, _ = load_model(context.inputs, "base")
    begins = range(model.config.depth) if begins is None else begins
    latents = read(context.input("features"), "heldout").stratified(recipe.samples)
    examples = drawn(latents, model.config.objective, recipe.draws, seed)
    room = memory_share(context.resources, context.device)
    return Replacements(model, examples, recipe, context.device, begins, room, context.stopping)
