"""What one step's task may take of the cluster, stage by stage."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from graftwork.specs.fields import Spec, refuse


class StepResources(Spec):
    """What one task (for `base`, `search` and `finetune`, one worker) takes of the cluster."""

    cpu: float = Field(1.0, ge=0)
    gpu: float = Field(0.0, ge=0, description="GPUs, or a share of one")
    memory: ByteSize | None = Field(None, gt=0, description="bytes of the node's memory, also as in 8GiB")
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="Ray's custom resources, by name")

    @field_validator("custom")
    @classmethod
    def _not_the_usual(cls, custom: dict[str, float]) -> dict[str, float]:
        for name, amount in custom.items():
            if name in ("CPU", "GPU", "memory"):
                refuse([name], amount, f"the field {name.lower()} beside it")
        return custom


class ResourcesSpec(Spec):
    """What each stage's tasks take; never part of a key."""

    features: StepResources = StepResources()
    base: StepResources = StepResources()
    classifier: StepResources = StepResources()
    profile: StepResources = StepResources()
    distill: StepResources = StepResources()
    search: StepResources = StepResources()
    select: StepResources = StepResources()
    finetune: StepResources = StepResources()
    evaluate: StepResources = StepResources()
    reference: StepResources = Field(StepResources(), description="as `evaluate` unless given")

    @model_validator(mode="after")
    def _reference_as_evaluate(self) -> Self:
        if "reference" not in self.model_fields_set:
            object.__setattr__(self, "reference", self.evaluate)
        return self
