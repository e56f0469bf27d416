"""How samples are drawn: the published ancestral chain, or DDIM in few steps.

A model predicts the noise (`epsilon`) or a velocity; a sampler serves one of them, or both.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.fields import Spec

Prediction = Literal["epsilon", "velocity"]  # what a model puts out


class AncestralSampler(Spec):
    """Respaced ancestral sampling with the learned variance: the published one."""

    serves: ClassVar[tuple[Prediction, ...]] = ("epsilon",)
    kind: Literal["ancestral"] = "ancestral"
    steps: int = Field(250, ge=2, le=1000)
    guidance: float = Field(1.5, ge=0, description="1 is no guidance")
    guided_channels: Literal["first_three", "all"] = Field("first_three", description="the published code guides three")


class DdimSampler(Spec):
    """Deterministic DDIM: for few steps."""

    serves: ClassVar[tuple[Prediction, ...]] = ("epsilon",)
    kind: Literal["ddim"] = "ddim"
    steps: int = Field(20, ge=2, le=1000)
    guidance: float = Field(1.5, ge=0, description="1 is no guidance")
    guided_channels: Literal["first_three", "all"] = Field("first_three", description="the published code guides three")


Sampler = Annotated[AncestralSampler | DdimSampler, Field(discriminator="kind")]
