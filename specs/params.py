"""What each stage is told: the part of a job that decides the result of one step, ready to be hashed.

Between the plan and a stage there is nothing but one of these; a stage sees no more of the job than its key does.
"""

from __future__ import annotations

from typing import Annotated, Literal

from graftwork.specs.codec import Codec
from graftwork.specs.data import Data
from graftwork.specs.edits import Edit
from graftwork.specs.evaluate import EvaluateSpec, Row
from graftwork.specs.fields import KeyedIfSet, LocalPath, Spec, Unkeyed
from graftwork.specs.layers.learned import Group
from graftwork.specs.layers.union import Layers
from graftwork.specs.metrics import Metric
from graftwork.specs.rootstock import Model, Weights
from graftwork.specs.sampler import Sampler
from graftwork.specs.training import ADDED_PRECISION, DistillSpec, FinetuneSpec, Precision, SearchSpec


class FeaturesParams(Spec):
    """Images to latents."""

    data: Data
    codec: Codec


class BaseParams(Spec):
    """The rootstock."""

    seed: int
    model: Model
    weights: Weights


class ClassifierParams(Spec):
    """The judge of the classifier metric."""

    seed: int


class ProfileParams(Spec):
    """Statistics of what the operators put out."""

    seed: int
    samples: int
    precision: Annotated[Precision, ADDED_PRECISION] = "fp32"


class DistillParams(Spec):
    """One scion, taught to mimic what stands in its site."""

    seed: int
    edit: Edit
    within: tuple[Edit, ...] = ()  # of a parallel block: the edits of its blocks, distilled before
    recipe: DistillSpec


class Rule(Spec):
    """One edit of the job: what it may replace, and the strategy that chooses; pairs are all made."""

    edits: tuple[Edit, ...]
    layers: Layers | None


class SelectParams(Spec):
    """What the plan of edits is chosen from."""

    depth: int
    rules: tuple[Rule, ...]


class SearchParams(Spec):
    """Gates that learn which of the candidates' sites, all of one target, to replace."""

    seed: int
    candidates: tuple[Edit, ...]
    groups: tuple[Group, ...]
    budget: float | None = None  # FLOPs of the whole model over the rootstock's; instead of groups
    recipe: SearchSpec


class FinetuneParams(Spec):
    """Stage 2, from distilled scions or (the control) from freshly initialised ones."""

    seed: int
    scions: Literal["distilled", "random"]
    recipe: FinetuneSpec


class TrainingStatisticsParams(Spec):
    """What a metric sees in the training images."""

    codec: Codec
    metric: Annotated[Metric, KeyedIfSet("classifier")] = "classifier"


class GivenStatisticsParams(Spec):
    """What a metric sees in the images of `evaluate.reference`, or the statistics that it is."""

    reference: Annotated[LocalPath, Unkeyed()]  # the content of both files is in the key
    background: str | None = None  # of images, in a folder: what shows through transparent pixels
    inception: Annotated[LocalPath | None, Unkeyed()] = None
    metric: Annotated[Metric, KeyedIfSet("fid")] = "fid"


class HeldoutParams(Spec):
    """The table's first row: real images that nothing was trained on."""

    codec: Codec
    samples: int
    metrics: tuple[Metric, ...]
    inception: Annotated[LocalPath | None, Unkeyed()] = None


class SampleParams(Spec):
    """Samples of one row of the table."""

    seed: int
    row: Row
    codec: Codec  # its weights are in the key of the features
    samples: int
    batch: int
    metrics: tuple[Metric, ...]
    sampler: Sampler
    precision: Precision = "fp32"
    keep_samples: bool = False
    inception: Annotated[LocalPath | None, Unkeyed()] = None
    compile: Annotated[bool, Unkeyed()] = False


class EvaluateParams(Spec):
    """The table over all rows."""

    seed: int
    recipe: EvaluateSpec
