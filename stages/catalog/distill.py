"""Stage 1: one scion a step, taught to mimic what stands in its site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from graftwork.specs.costs import block_cost, learns, rootstock_cost, scion_cost
from graftwork.specs.edits import Edit, Parallel
from graftwork.specs.fields import Spec
from graftwork.specs.resources import StepResources
from graftwork.specs.training import DistillSpec
from graftwork.stages.catalog.flops import TRAINING, RootstockFlops
from graftwork.stages.catalog.inputs import few_samples, rootstock, scions, stream
from graftwork.stages.stage import External, Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec

# Bytes that a sample takes while a site learns from it as it passes, over those of what goes in and out there: what the
# scion keeps for its backward pass, in fp32, and what the rootstock's block needs beside it. An estimate.
COPIES = 16
SCION_COPIES = 4  # of a scion in training, in fp32: weights, gradient, and two moments
MIN_RECORDING_SAMPLES = 256  # of a site's pass, for a task of its own that records activations


class DistillParams(Spec):
    """One scion, taught to mimic what stands in its site."""

    seed: int
    edit: Edit
    within: tuple[Edit, ...] = ()  # of a parallel block: the edits of its blocks, distilled before
    recipe: DistillSpec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    recipe, edits, flops = job.distill, job.edits(), RootstockFlops.of(job)
    solved = {*job.candidates()}
    outside = few_samples(job, recipe.samples, recipe.num_heldout) | stream(recipe.precision)
    for edit in edits:
        within = () if edit in solved else _within(edit, edits)
        yield StepDraft(
            f"distill/{edit.name}",
            DistillParams(seed=job.seed, edit=edit, within=within, recipe=recipe),
            rootstock(job) | scions(within) | ({"profile": "profile"} if recipe.loss == "auto" else {}),
            outside,
            (External("scions", edit.scions, "graft.scions"),) if edit.scions else (),
            work=_work(recipe, edit, flops),
            workers=recipe.workers if learns(edit, flops.place) else 1,  # of what is only measured
            precision=recipe.precision,
        )


def _within(edit: Edit, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Return the edits of the blocks that a parallel block takes in."""
    if edit.site.target != "pair":
        return ()
    blocks = (edit.site.block, edit.site.block + 1)
    return tuple(other for other in edits if other.site.target != "pair" and other.site.block in blocks)


def _work(recipe: DistillSpec, edit: Edit, rootstock: RootstockFlops) -> Work:
    """Section 4 of the method: the pass up to the site's block, then epochs over what it left."""
    training, heldout = recipe.samples * recipe.draws, recipe.num_heldout
    scion, last = scion_cost(edit, rootstock.place).flops, edit.site.block
    if isinstance(edit.operator, Parallel):  # both blocks learn, and a projection that merges them
        scion += 2 * block_cost(rootstock.place, rootstock.model).flops
        last += 1
    if learns(edit, rootstock.place):
        samples = (recipe.passes or recipe.epochs) * (TRAINING * training + heldout)
        passed = (training + heldout) * (recipe.passes or 1)
    else:  # it is only measured: where nothing is kept, by a pass for each of two errors
        samples, passed = heldout, 2 * heldout if recipe.passes else training + heldout
    values = 0 if recipe.passes else 2 * (training + heldout) * rootstock.place.num_tokens * rootstock.place.width
    return Work(
        own=float(scion * samples),
        shared=float(rootstock.up_to(last) * passed),
        activations=values * (2 if recipe.precision == "bf16" else 4),
        block=edit.site.block,
    )


def streaming_memory(job: JobSpec) -> tuple[int, int, int] | None:
    """Return the bytes that a task of all sites holds where nothing of the passes is kept, about: the rootstock, all
    scions in training, and each sample that passes at once. None where activations are kept.

    The number of samples in all is none of it.
    """
    if job.distill.passes is None:
        return None
    place, channels = job.place(), job.codec.latent_channels(job.data)
    rootstock = 4 * rootstock_cost(job.model, place, channels, num_classes=1).params
    scions = sum(scion_cost(edit, place).params for edit in job.edits() if learns(edit, place))
    pair = 2 * place.num_tokens * place.width * (2 if job.distill.precision == "bf16" else 4)
    return rootstock, 4 * SCION_COPIES * scions, COPIES * pair


def recording_tasks(params: Sequence[DistillParams], resources: StepResources, slots: int) -> int:
    """Return the number of tasks that record activations before distillation starts.

    0 if every distillation task runs the rootstock itself: on GPUs, with `distill.activations` set, for one site, for
    too few samples, if all sites are in one task, or if nothing is kept.
    """
    recipe = params[0].recipe
    if resources.gpu or recipe.activations is not None or recipe.passes is not None or len(params) < 2:
        return 0
    tasks = min(slots, recipe.samples * recipe.draws // MIN_RECORDING_SAMPLES)
    return tasks if tasks > 1 else 0


STAGE = Stage(
    version=3,
    steps=steps,
    module="graftwork.stages.distillation.distill",
    shares=recording_tasks,
    memory="distill.activations, distill.batch, distill.micro_batch, distill.samples or distill.draws",
)
