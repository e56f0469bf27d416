"""SiT (arXiv 2401.08740): a DiT's network and tensors, whose output is the velocity of a flow from noise to data.

Its timestep lies in [0, 1], with data at 1, and goes into the sinusoids as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graftwork.models.objectives import Objective, objective_of
from graftwork.models.rootstocks import register
from graftwork.models.rootstocks.dit import FILES as DIT_FILES
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.specs.rootstock import SitModel

FILES = replace(
    DIT_FILES,
    name="SiT",
    prediction=SitModel.prediction,
    accepted="a SiT: velocity, linear path",
    network=DIT_FILES.name,
    arguments={"path_type": "Linear", "prediction": "velocity"},
    layouts=("graftwork", "published"),
)


@dataclass(frozen=True, kw_only=True)
class SiTConfig(DiTConfig):
    """Everything that fixes the tensors of a SiT: what does of a DiT."""

    kind: ClassVar[str] = "sit"
    files: ClassVar[FamilyFiles] = FILES

    @property
    def objective(self) -> Objective:
        return objective_of("velocity")


@register(SiTConfig)
class SiT(DiT):
    """The whole transformer: a point between noise and data, its t and its label in; the velocity out."""
