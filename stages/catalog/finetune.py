"""Stage 2: the graft is finetuned, and beside it a control whose scions were never distilled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from graftwork.specs.fields import Spec
from graftwork.specs.training import FinetuneSpec
from graftwork.stages.catalog.flops import RootstockFlops, graft_flops, training
from graftwork.stages.catalog.inputs import few_samples, hybrid, num_training_images, rootstock
from graftwork.stages.stage import Needs, Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class FinetuneParams(Spec):
    """Stage 2, from distilled scions or (the control) from freshly initialised ones."""

    seed: int
    scions: Literal["distilled", "random"]
    recipe: FinetuneSpec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    recipe, needs = job.finetune, hybrid(job)
    for number, layers in job.learned().items():
        if layers.finetune_from == "search":
            needs |= {"searched": f"search/{number}"}
    work = training(recipe, graft_flops(job))
    if recipe.teacher is not None:
        work = Work(work.own + teacher_flops(job))

    def step(name: str, scions: Literal["distilled", "random"], needs: Needs) -> StepDraft:
        return StepDraft(
            name,
            FinetuneParams(seed=job.seed, scions=scions, recipe=recipe),
            needs,
            few_samples(job, num_training_images(job, recipe.fraction)),
            work=work,
            workers=recipe.workers,
            precision=recipe.precision,
        )

    yield step("finetune", "distilled", needs)
    if recipe.control:
        yield step("finetune/random_init", "random", rootstock(job) | {"select": "select"})


def teacher_flops(job: JobSpec) -> float:
    """Return those of the passes of a finetune's teacher, one a sample."""
    recipe = job.finetune
    return float(RootstockFlops.of(job).whole() * recipe.steps * recipe.batch)


STAGE = Stage(
    version=4,
    steps=steps,
    module="graftwork.stages.training.finetune",
    orchestrates=True,
    trains=True,
    makes_model=True,
    memory="finetune.micro_batch, raise finetune.workers or set finetune.checkpointing",
)
