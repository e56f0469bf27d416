"""What a job's model is told, classes or texts: which data, settings and files go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.data import TEXT_DATA, SyntheticData
from graftwork.specs.rootstock import CheckpointWeights, PretrainWeights
from graftwork.specs.training import TrainingSpec

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec

Refusal = tuple[list[str | int], object, str]  # field, what it is, what is accepted


def conditioning_misfit(job: JobSpec) -> Refusal | None:
    """Return the first field of a job that is about another condition than its model's."""
    return next(_of_texts(job) if job.model.told == "texts" else _of_classes(job), None)


def trainings(job: JobSpec) -> dict[tuple[str | int, ...], TrainingSpec]:
    """Return the recipes of the job's trainings by their fields."""
    recipes: dict[tuple[str | int, ...], TrainingSpec] = {("finetune",): job.finetune}
    if isinstance(job.weights, TrainingSpec):
        recipes["weights",] = job.weights
    for number, layers in job.learned().items():
        recipes["graft", number, "layers", "search"] = layers.search
    return recipes


def dropout_field(job: JobSpec) -> str:
    """Return the field of a training by which conditions are dropped."""
    return "caption_dropout" if job.model.told == "texts" else "label_dropout"


def _of_texts(job: JobSpec) -> Iterator[Refusal]:
    why = f"for a {job.model.kind}, which is told texts"
    if job.text is None:
        yield ["text"], None, f"{{kind: t5, path: ..}}, {why}"
    if not isinstance(job.data, TEXT_DATA):
        yield ["data", "kind"], job.data.kind, f"captions or synthetic, {why}"
    if isinstance(job.data, SyntheticData) and not isinstance(job.weights, CheckpointWeights):
        accepted = "checkpoint with data.kind synthetic: the rootstock draws the samples before any training"
        yield ["weights", "kind"], job.weights.kind, accepted
    if isinstance(job.weights, CheckpointWeights) and job.weights.classes is not None:
        yield ["weights", "classes"], job.weights.classes, f"no classes, {why}"
    if isinstance(job.weights, PretrainWeights) and "label_std" in job.weights.model_fields_set:
        yield ["weights", "label_std"], job.weights.label_std, f"no label_std, {why}"
    for field, recipe in trainings(job).items():
        if "label_dropout" in recipe.model_fields_set:
            yield [*field, "label_dropout"], recipe.label_dropout, f"caption_dropout, {why}"


def _of_classes(job: JobSpec) -> Iterator[Refusal]:
    why = f"for a {job.model.kind}, which is told classes"
    if job.text is not None:
        yield ["text"], job.text.path, f"no text, {why}"
    if isinstance(job.data, TEXT_DATA):
        yield ["data", "kind"], job.data.kind, f"digits or image_folder, {why}"
    if job.evaluate.prompts is not None:
        yield ["evaluate", "prompts"], job.evaluate.prompts, f"no prompts, {why}"
    for field, recipe in trainings(job).items():
        if recipe.caption_dropout is not None:
            yield [*field, "caption_dropout"], recipe.caption_dropout, f"label_dropout, {why}"
