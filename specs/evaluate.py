"""How a model is measured: the sampler, the metrics and what they are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.specs.clip import ClipSpec
from graftwork.specs.detector import Detector
from graftwork.specs.fields import KeyedIfSet, LocalPath, Spec, Unkeyed, refuse
from graftwork.specs.likeness import DinoSpec, LikenessSpec
from graftwork.specs.metrics import METRICS, Metric
from graftwork.specs.sampler import AncestralSampler, Sampler
from graftwork.specs.solve import MAX_FINALISTS
from graftwork.specs.training import Precision

FINALISTS = tuple(f"finalist{number}" for number in range(1, 1 + MAX_FINALISTS))  # of a solver's plans
if TYPE_CHECKING:
    Row = str
else:
    Row = Literal[("rootstock", *FINALISTS, "stage1", "stage2", "random_init")]


class EvaluateSpec(Spec):
    """What is sampled and what is measured.

    `classifier`: Frechet distance on the features of a small classifier that the job trains on its own data, and the
    share of samples that it reads as their label. `fid`, `sfid`, `is`, `precision_recall`, `kid`: as ImageNet papers
    report them, on the features of pytorch-fid's Inception network.
    `geneval`: the share of samples that show what their prompts say, by GenEval's rules. `clip_score`: how near samples
    are to their texts, as a CLIP sees both. `likeness`: how near samples are to the rootstock's of the same noise.
    """

    samples: int = Field(50_000, ge=2)
    batch: int = Field(64, ge=1, description="samples at a time")
    metrics: tuple[Metric, ...] = Field(("classifier",), min_length=1)
    # The table's key has those of its rows.
    rows: Annotated[tuple[Row, ...] | None, Unkeyed()] = Field(
        None,
        min_length=1,
        description="models to sample and measure, beside `heldout`; by default all that the job makes: random_init if "
        "finetune.control is true, finalists if solve.finalists are asked for, and the others",
    )
    # Its content is in the key of the texts.
    prompts: Annotated[LocalPath | None, Unkeyed()] = Field(
        None,
        description="of a model that is told texts: a file of prompts to sample for in turn: a line each, or GenEval's "
        ".jsonl; by default the captions of the data",
    )
    detector: Annotated[Detector | None, KeyedIfSet()] = Field(
        None, description="for geneval: what finds the objects in samples"
    )
    clip: Annotated[ClipSpec | None, KeyedIfSet()] = Field(None, description="for clip_score: the CLIP")
    dino: Annotated[DinoSpec | None, KeyedIfSet()] = Field(None, description="for fd_dino: the DINO")
    likeness: Annotated[LikenessSpec | None, KeyedIfSet()] = Field(
        None, description="for likeness: on how many samples, and by which networks; by default on 1,000, by PSNR alone"
    )
    sampler: Sampler = Field(AncestralSampler(), description="without it, that of the model's kind")
    precision: Precision = Field("fp32", description="of the model's passes. On a CPU tf32 is fp32")
    keep_samples: bool = Field(False, description="leave every sample in samples.npy; else the first 40, as a picture")
    compile: Annotated[bool, Unkeyed()] = Field(
        False, description="torch.compile the models to sample from; samples then differ in their last bits"
    )
    # The content of both files is in the key.
    reference: Annotated[LocalPath | None, Unkeyed()] = Field(
        None,
        description="for fid, sfid, precision_recall and kid: images, in a folder or an .npz with arr_0; for fid and "
        "sfid also an .npz with statistics",
    )
    inception: Annotated[LocalPath | None, Unkeyed()] = Field(
        None, description="for fid, sfid, is, precision_recall and kid: Inception weights; by default torch's hub cache"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for metric in self.metrics:
            METRICS[metric].check_section(self)
        for number, row in enumerate(self.rows or ()):
            if row in (self.rows or ())[:number]:
                refuse(["rows", number], row, "each row once")
        return self
