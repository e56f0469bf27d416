"""How samples are drawn: as published for what the model predicts, or by any scheduler of diffusers.

A model predicts the noise (`epsilon`, as a DiT does) or a velocity (as a SiT does); a sampler serves one of them, or
both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from graftwork.specs.fields import Spec, refuse

Prediction = Literal["epsilon", "velocity"]
Guidance = Annotated[float, Field(ge=0, description="1 is no guidance")]
GuidedChannels = Annotated[Literal["first_three", "all"], Field(description="the published code guides three")]
PREDICTED: Mapping[Prediction, str] = {"epsilon": "the noise", "velocity": "a velocity"}
DOPRI5_EVALUATIONS = 60  # of a network, about, at the published tolerances

# Schedulers by their usual names: diffusers' classes for models that predict the noise, and a velocity.
SCHEDULERS: Mapping[str, Mapping[Prediction, str]] = {
    "ddim": {"epsilon": "DDIMScheduler"},
    "ddpm": {"epsilon": "DDPMScheduler"},
    "deis": {"epsilon": "DEISMultistepScheduler", "velocity": "DEISMultistepScheduler"},
    "dpmsolver++": {"epsilon": "DPMSolverMultistepScheduler", "velocity": "DPMSolverMultistepScheduler"},
    "euler": {"epsilon": "EulerDiscreteScheduler", "velocity": "FlowMatchEulerDiscreteScheduler"},
    "euler_ancestral": {"epsilon": "EulerAncestralDiscreteScheduler"},
    "heun": {"epsilon": "HeunDiscreteScheduler", "velocity": "FlowMatchHeunDiscreteScheduler"},
    "pndm": {"epsilon": "PNDMScheduler"},
    "unipc": {"epsilon": "UniPCMultistepScheduler", "velocity": "UniPCMultistepScheduler"},
}
SCHEDULER_CLASS = re.compile(r"[A-Z]\w*Scheduler")
EVALUATES_TWICE = re.compile(r"Heun|KDPM2")  # a step


class AncestralSampler(Spec):
    """Respaced ancestral sampling with the learned variance: the published one."""

    serves: ClassVar[tuple[Prediction, ...]] = ("epsilon",)
    kind: Literal["ancestral"] = "ancestral"
    steps: int = Field(250, ge=2, le=1000)
    guidance: Guidance = 1.5
    guided_channels: GuidedChannels = "first_three"

    def evaluations(self) -> int:
        """Return how often a sample's network is evaluated, guidance aside."""
        return self.steps


class DdimSampler(Spec):
    """Deterministic DDIM: for few steps."""

    serves: ClassVar[tuple[Prediction, ...]] = ("epsilon",)
    kind: Literal["ddim"] = "ddim"
    steps: int = Field(20, ge=2, le=1000)
    guidance: Guidance = 1.5
    guided_channels: GuidedChannels = "first_three"

    def evaluations(self) -> int:
        """Return how often a sample's network is evaluated, guidance aside."""
        return self.steps


class OdeSampler(Spec):
    """The ODE of a model that predicts a velocity, from noise at t = 0 to data at t = 1 (SiT)."""

    serves: ClassVar[tuple[Prediction, ...]] = ("velocity",)
    kind: Literal["ode"] = "ode"
    method: Literal["euler", "heun", "dopri5"] = Field(
        "dopri5",
        description="euler and heun take `steps` equal steps; dopri5, as published, as many as its tolerances need",
    )
    steps: int = Field(50, ge=1, le=1000, description="of euler, and of heun, which evaluates the model twice a step")
    atol: float = Field(1e-6, gt=0, description="of dopri5: the error of a step, absolute and ..")
    rtol: float = Field(1e-3, gt=0, description=".. relative to the sample; each sample has a step size of its own")
    guidance: Guidance = 1.5
    guided_channels: GuidedChannels = "first_three"

    @model_validator(mode="after")
    def _of_the_method(self) -> Self:
        without = {"dopri5": {"steps": "none, or method euler or heun"}}
        tolerances = dict.fromkeys(("atol", "rtol"), "none, or method dopri5")
        for name, accepted in without.get(self.method, tolerances).items():
            if getattr(self, name) != type(self).model_fields[name].default:
                refuse([name], getattr(self, name), accepted)
        return self

    def evaluations(self) -> int:
        """Return how often a sample's network is evaluated, guidance aside; of dopri5 about."""
        return {"euler": self.steps, "heun": 2 * self.steps, "dopri5": DOPRI5_EVALUATIONS}[self.method]


class SdeSampler(Spec):
    """The SDE of a model that predicts a velocity, by Euler-Maruyama steps: the published one (SiT)."""

    serves: ClassVar[tuple[Prediction, ...]] = ("velocity",)
    kind: Literal["sde"] = "sde"
    steps: int = Field(250, ge=2, le=1000, description="the last, of 0.04, is taken without noise")
    guidance: Guidance = 1.5
    guided_channels: GuidedChannels = "first_three"

    def evaluations(self) -> int:
        """Return how often a sample's network is evaluated, guidance aside."""
        return self.steps


class SchedulerSampler(Spec):
    """A scheduler of diffusers, set up for the model."""

    serves: ClassVar[tuple[Prediction, ...]] = ("epsilon", "velocity")
    kind: Literal["scheduler"] = "scheduler"
    name: str = Field(description=f"{', '.join(SCHEDULERS)}, or a class of diffusers, as DPMSolverSinglestepScheduler")
    steps: int = Field(20, ge=1, le=1000)
    options: dict[str, bool | int | float | str] = Field(
        {}, description="what else the class takes, as {solver_order: 3, use_karras_sigmas: true}"
    )
    guidance: Guidance = 1.5
    guided_channels: GuidedChannels = "first_three"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SCHEDULERS and SCHEDULER_CLASS.fullmatch(name) is None:
            refuse([], name, f"{', '.join(SCHEDULERS)}, or the name of a class, which ends in Scheduler")
        return name

    def class_name(self, prediction: Prediction) -> str:
        """Return the name of diffusers' class for a model that predicts this; see `misfit`."""
        return SCHEDULERS.get(self.name, {}).get(prediction, self.name)

    def misfit(self, prediction: Prediction) -> str | None:
        """Return which names are accepted, if this one is of no scheduler for such a model, as far as names tell."""
        names = [name for name, classes in SCHEDULERS.items() if prediction in classes]
        other = self.name in SCHEDULERS and self.name not in names
        if not other and not (prediction == "epsilon" and "FlowMatch" in self.name):
            return None
        return f"{', '.join(names)}, or a class for models that predict {PREDICTED[prediction]}, as this one does"

    def evaluations(self) -> int:
        """Return how often a sample's network is evaluated, guidance aside; of rare classes about."""
        classes = [self.name, *SCHEDULERS.get(self.name, {}).values()]
        return 2 * self.steps - 1 if any(map(EVALUATES_TWICE.search, classes)) else self.steps


AnySampler = AncestralSampler | DdimSampler | OdeSampler | SdeSampler | SchedulerSampler
SAMPLERS: tuple[type[AnySampler], ...] = get_args(AnySampler)
Sampler = Annotated[AnySampler, Field(discriminator="kind")]
