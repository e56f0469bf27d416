"""What steps of several stages need, and the words in keys for rules that changed: shared by the files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from graftwork.specs.data import SyntheticData
from graftwork.specs.text import JSON_PROMPTS
from graftwork.stages.data.sources import are_here, num_classes, split_sizes
from graftwork.stages.stage import Needs

if TYPE_CHECKING:
    from graftwork.specs.edits import Edit
    from graftwork.specs.job import JobSpec
    from graftwork.specs.training import Precision

LABELS: Needs = {"features": "features"}  # of who takes no latents, only what they are and the classes or texts
RULES = ("last_turn", "few_samples", "stream")  # among what lies outside: how a step does what it did otherwise before


def images(job: JobSpec) -> Needs:
    """Return the needs of who takes latents: of images, or those that the rootstock drew."""
    return {"features": "synthesis" if isinstance(job.data, SyntheticData) else "features"}


def texts(job: JobSpec) -> Needs:
    """Return the needs of who is told texts, if the job has any."""
    return {"text": "text"} if job.text else {}


def features(job: JobSpec) -> Needs:
    """Return the needs of who takes latents with what a network is told of them."""
    return images(job) | texts(job)


def rootstock(job: JobSpec) -> Needs:
    """Return the needs of who runs the rootstock."""
    return features(job) | {"base": "base"}


def scions(edits: Iterable[Edit]) -> Needs:
    """Return the needs of who takes these edits' distilled scions."""
    return {f"scions/{edit.name}": f"distill/{edit.name}" for edit in edits}


def selection(job: JobSpec) -> Needs:
    """Return the needs of who takes the plan of edits that is made: of finalists, the best one's."""
    return {"select": "select/finalist" if job.finalists() else "select"}


def hybrid(job: JobSpec) -> Needs:
    """Return the needs of who takes the graft after stage 1."""
    return rootstock(job) | selection(job) | scions(job.edits())


def last_turn(job: JobSpec) -> dict[str, str]:
    """Say, in the keys of those that have one, how the classes of a turn that is not full are chosen."""
    classes = num_classes(job.data)
    return {"last_turn": "spread"} if classes and job.evaluate.samples % classes else {}


def stream(precision: Precision) -> dict[str, str]:
    """Say, in the keys of those that autocast makes bf16, what the stream of the blocks is."""
    return {"stream": "fp32"} if precision == "bf16" else {}


def few_samples(job: JobSpec, *counts: float) -> dict[str, str]:
    """Say, in the keys of those that it concerns, how fewer samples than classes are chosen."""
    classes = num_classes(job.data)
    return {"few_samples": "spread"} if classes and min(counts) < classes else {}


def prompts_format(path: str) -> dict[str, str]:
    """Say, in the keys of who reads a file of prompts, what its name says: the same bytes may be other prompts."""
    return {"prompts_format": "jsonl"} if path.endswith(JSON_PROMPTS) else {}


def num_training_images(job: JobSpec, fraction: float) -> float:
    """Return how many a share of the training images is; infinity if they are elsewhere."""
    return max(1, round(split_sizes(job.data)[0] * fraction)) if are_here(job.data) else math.inf
