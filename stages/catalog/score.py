"""How much the whole model's output changes with one candidate in it: what layers are chosen by before any finetune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.costs import block_cost
from graftwork.specs.edits import Edit
from graftwork.specs.fields import Spec
from graftwork.specs.solve import ScoreSpec
from graftwork.stages.catalog.flops import RootstockFlops
from graftwork.stages.catalog.inputs import few_samples, rootstock, stream
from graftwork.stages.stage import Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class ScoreParams(Spec):
    """One candidate, alone in the rootstock."""

    seed: int
    edit: Edit
    recipe: ScoreSpec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    recipe, flops = job.score, RootstockFlops.of(job)
    passed = recipe.samples * recipe.draws
    whole, block = flops.whole(), block_cost(flops.place, flops.model).flops
    for edit in job.scored():
        behind = (job.model.depth - edit.site.block) * block
        yield StepDraft(
            f"score/{edit.name}",
            ScoreParams(seed=job.seed, edit=edit, recipe=recipe),
            rootstock(job) | {"scion": f"distill/{edit.name}"},
            few_samples(job, recipe.samples) | stream(recipe.precision),
            work=Work(own=float(behind * passed), shared=float(whole * passed)),
            precision=recipe.precision,
        )


STAGE = Stage(
    version=1,
    steps=steps,
    module="graftwork.stages.selection.score",
    shares=lambda params, resources, slots: 0,  # each task runs the rootstock for its own candidates
    together=True,
    memory="score.batch",
)
