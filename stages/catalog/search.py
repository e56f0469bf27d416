"""Learned selection: gates that learn which sites to replace, a step for each edit that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.costs import scion_cost
from graftwork.specs.edits import Edit
from graftwork.specs.fields import Spec
from graftwork.specs.layers.learned import Group
from graftwork.specs.training import SearchSpec
from graftwork.stages.catalog.flops import RootstockFlops, training
from graftwork.stages.catalog.inputs import few_samples, num_training_images, rootstock, scions
from graftwork.stages.stage import Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class SearchParams(Spec):
    """Gates that learn which of the candidates' sites, all of one target, to replace."""

    seed: int
    candidates: tuple[Edit, ...]
    groups: tuple[Group, ...]
    budget: float | None = None  # FLOPs of the whole model over the rootstock's; instead of groups
    recipe: SearchSpec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    depth, flops = job.model.depth, RootstockFlops.of(job)
    for number, layers in job.learned().items():
        candidates, recipe = job.rules()[number], layers.search
        params = SearchParams(
            seed=job.seed,
            candidates=candidates,
            groups=layers.grouped(depth) if layers.budget is None else (),
            budget=layers.budget,
            recipe=recipe,
        )
        both = flops.whole() + sum(scion_cost(edit, flops.place).flops for edit in candidates)
        yield StepDraft(
            f"search/{number}",
            params,
            rootstock(job) | scions(candidates),
            few_samples(job, num_training_images(job, recipe.fraction)),
            work=training(recipe, both),
            workers=recipe.workers,
            precision=recipe.precision,
        )


STAGE = Stage(
    version=4,
    steps=steps,
    module="graftwork.stages.selection.search",
    orchestrates=True,
    trains=True,
    memory="layers.search.micro_batch, or set layers.search.checkpointing",
)
