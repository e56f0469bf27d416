"""A job: everything that one `graft run` is asked to do, in one file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from specs.data import Codec, Data, DigitsData, PixelCodec
from specs.evaluate import EvaluateSpec
from specs.fields import Spec, refuse
from specs.graft import Edit, EditSpec
from specs.layers import ExplicitLayers
from specs.model import DitModel, PretrainWeights, Weights
from specs.training import DistillSpec, FinetuneSpec


class StepResources(Spec):
    """What one task (for `base` and `finetune`, one worker) takes of the cluster."""

    cpu: float = Field(1.0, ge=0)
    gpu: float = Field(0.0, ge=0, description="GPUs, or a share of one")


class ResourcesSpec(Spec):
    """What each stage's tasks take; never part of a key."""

    features: StepResources = StepResources()
    base: StepResources = StepResources()
    classifier: StepResources = StepResources()
    profile: StepResources = StepResources()
    distill: StepResources = StepResources()
    select: StepResources = StepResources()
    finetune: StepResources = StepResources()
    evaluate: StepResources = StepResources()


class TrackingSpec(Spec):
    """The MLflow server or database that records the job."""

    uri: str | None = Field(
        None, description="http://host:5000 or sqlite:///file; by default a SQLite file in the store"
    )
    experiment: str = Field("graftwork", min_length=1)


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class JobSpec(Spec):
    """One job, end to end."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = DigitsData()
    codec: Codec = PixelCodec()
    model: DitModel
    weights: Weights = PretrainWeights()
    graft: tuple[EditSpec, ...] = Field(min_length=1)
    distill: DistillSpec = DistillSpec()
    finetune: FinetuneSpec = FinetuneSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    resources: ResourcesSpec = ResourcesSpec()
    store: str = Field(".graftwork", min_length=1, description="a folder, or any fsspec URI")
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.data.image_size % self.model.patch:
            refuse(["data", "image_size"], self.data.image_size, f"a multiple of the patch, {self.model.patch}")
        taken: dict[str, int] = {}
        for number, edit in enumerate(self.graft):
            if isinstance(edit.layers, ExplicitLayers):
                for position, block in enumerate(edit.layers.blocks):
                    if block >= self.model.depth:
                        refuse(
                            ["graft", number, "layers", "blocks", position],
                            block,
                            f"a block of this model, 0 .. {self.model.depth - 1}",
                        )
            edits = edit.edits(self.model.depth)
            if not edits:
                refuse(
                    ["graft", number, "layers"],
                    edit.layers.reason(),
                    f"layers that choose some of {self.model.depth} blocks",
                )
            for site in (str(one.site) for one in edits):
                if site in taken:
                    refuse(["graft", number, "layers"], site, f"sites that graft.{taken[site]} has not taken")
                taken[site] = number
        return self

    def edits(self) -> tuple[Edit, ...]:
        """Every edit of the job, site by site, in the order of the blocks."""
        chosen = [edit for spec in self.graft for edit in spec.edits(self.model.depth)]
        return tuple(sorted(chosen, key=lambda edit: (edit.site.block, edit.site.target)))
