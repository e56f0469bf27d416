"""What each operator adds to the latency and the peak memory of a model, measured on the device that the job names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from graftwork.specs.edits import Edit, Site
from graftwork.specs.fields import Spec
from graftwork.specs.rootstock import Model
from graftwork.specs.solving import ACCELERATOR
from graftwork.specs.training import Precision
from graftwork.stages.catalog.inputs import LABELS, texts
from graftwork.stages.stage import Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec
    from graftwork.specs.resources import StepResources

PACKAGES = ("torch", "triton", "flash-attn", "mamba-ssm", "causal-conv1d")  # whose code runs in an operator


class CostParams(Spec):
    """One of each operator that may stand in a block, and the blocks as they are."""

    model: Model
    operators: tuple[Edit, ...]  # each in the first block
    batch: int
    precision: Precision


def steps(job: JobSpec) -> Iterator[StepDraft]:
    if job.solve is None:
        return
    params = CostParams(
        model=job.model, operators=distinct(job.edits()), batch=job.evaluate.batch, precision=job.evaluate.precision
    )
    outside = {"device": device_of(job.resources.of("cost")), **versions()}
    yield StepDraft("cost", params, LABELS | texts(job), outside, precision=job.evaluate.precision)


def distinct(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Return an edit of the first block for each operator that edits put into some: blocks are all of one shape."""
    first = {(edit.site.target, edit.operator): edit for edit in edits}
    return tuple(in_first_block(edit) for edit in first.values())


def in_first_block(edit: Edit) -> Edit:
    """Return the edit that puts the same operator into the first block."""
    return Edit(site=Site(block=0, target=edit.site.target), operator=edit.operator)


def device_of(resources: StepResources) -> str:
    """Return the kind of device that a step's resources ask for: cpu, gpu, or a GPU's model as Ray names it."""
    models = [name.removeprefix(ACCELERATOR) for name in resources.custom if name.startswith(ACCELERATOR)]
    return ", ".join(models) or ("gpu" if resources.gpu else "cpu")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages whose code runs in an operator, of those that are installed."""
    by_package = dict[str, str]()
    for package in PACKAGES:
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return by_package


STAGE = Stage(version=1, steps=steps, module="graftwork.stages.selection.cost", memory="evaluate.batch")
