"""How samples are drawn: the published ancestral chain, or DDIM in few steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graftwork.specs.fields import Spec


class AncestralSampler(Spec):
    """Respaced ancestral sampling with the learned variance: the published one."""

    kind: Literal["ancestral"] = "ancestral"
    steps: int = Field(250, ge=2, le=1000)
    guidance: float = Field(1.5, ge=0, description="1 is no guidance")
    guided_channels: Literal["first_three", "all"] = Field("first_three", description="the published code guides three")


class DdimSampler(Spec):
    """Deterministic DDIM: for few steps."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(20, ge=2, le=1000)
    guidance: float = Field(1.5, ge=0, description="1 is no guidance")
    guided_channels: Literal["first_three", "all"] = Field("first_three", description="the published code guides three")


Sampler = Annotated[AncestralSampler | DdimSampler, Field(discriminator="kind")]
