"""Stage 2: the graft is finetuned, and beside it a control whose scions were never distilled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from graftwork.specs.fields import KeyedIfSet, Spec
from graftwork.specs.training import FinetuneSpec
from graftwork.stages.catalog.flops import RootstockFlops, graft_flops, training
from graftwork.stages.catalog.inputs import few_samples, hybrid, num_training_images, rootstock, selection
from graftwork.stages.stage import Needs, Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class FinetuneParams(Spec):
    """Stage 2, from distilled scions or (the control) from freshly initialised ones."""

    seed: int
    scions: Literal["distilled", "random"]
    recipe: FinetuneSpec
    plan: Annotated[int | None, KeyedIfSet()] = None  # of a solver's, counted from 0; by default the one that is made


def steps(job: JobSpec) -> Iterator[StepDraft]:
    recipe, needs = job.finetune, hybrid(job)
    for number, layers in job.learned().items():
        if layers.finetune_from == "search":
            needs |= {"searched": f"search/{number}"}
    work = training(recipe, graft_flops(job))
    if recipe.teacher is not None:
        work = Work(work.own + teacher_flops(job))

    def step(name: str, scions: Literal["distilled", "random"], needs: Needs, plan: int | None = None) -> StepDraft:
        short = recipe if plan is None else _short(job)
        return StepDraft(
            name,
            FinetuneParams(seed=job.seed, scions=scions, recipe=short, plan=plan),
            needs,
            few_samples(job, num_training_images(job, recipe.fraction)),
            work=Work(work.own * short.steps / recipe.steps),
            workers=recipe.workers,
            precision=recipe.precision,
        )

    for plan, name in enumerate(job.finalists()):
        yield step(f"finetune/{name}", "distilled", needs | {"select": "select"}, plan)
    yield step("finetune", "distilled", needs)
    if recipe.control:
        yield step("finetune/random_init", "random", rootstock(job) | selection(job))


def _short(job: JobSpec) -> FinetuneSpec:
    """Return the recipe of a finalist's finetune, whose warm-up takes the same share of it."""
    recipe = job.finetune
    assert job.solve is not None and job.solve.finalists is not None
    steps = job.solve.finalists.steps
    return recipe.model_copy(update={"steps": steps, "warmup": recipe.warmup * steps // recipe.steps})


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
