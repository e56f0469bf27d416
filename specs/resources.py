"""What one step's task may take of the cluster, stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import ByteSize, Field, create_model, field_validator, model_validator

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


# In the order in which the planner asks them for their steps. Each is a module of its name in stages/catalog.
STAGES = (
    *("features", "text", "base", "synthesis", "classifier", "profile", "distill", "search", "score", "cost", "select"),
    *("trial", "finetune", "reference", "evaluate"),
)
UNLESS_GIVEN = {
    **{"reference": "evaluate", "synthesis": "evaluate", "cost": "evaluate"},
    **{"select": "score", "trial": "score"},
}  # stages that take what another takes


class StageResources(Spec):
    """What each stage's tasks take; never part of a key."""

    def of(self, stage: str) -> StepResources:
        resources: StepResources = getattr(self, stage)
        return resources

    @model_validator(mode="after")
    def _take_what_another_takes(self) -> Self:
        for stage, other in UNLESS_GIVEN.items():
            if stage not in self.model_fields_set:
                object.__setattr__(self, stage, self.of(other))
        return self


def _field(stage: str) -> Any:
    other = UNLESS_GIVEN.get(stage)
    return Field(StepResources(), description=f"as `{other}` unless given" if other else None)


if TYPE_CHECKING:
    ResourcesSpec = StageResources
else:
    ResourcesSpec = create_model(
        "ResourcesSpec",
        __base__=StageResources,
        __doc__=StageResources.__doc__,
        __module__=__name__,
        **{stage: (StepResources, _field(stage)) for stage in STAGES},
    )
