"""A graft as diffusers sees a DiT: the model that DiTPipeline samples from.

Importing this module is what lets `DiTPipeline.from_pretrained` load such a model: diffusers imports no module just
because a folder names one.
"""

from __future__ import annotations

from typing import ClassVar

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look here
from torch import Tensor

from graftwork.models.checkpoints.layouts.graft_model import GraftModel
from graftwork.models.condition import Condition
from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.rootstocks.dit import DiT, DiTConfig


class GraftTransformer2DModel(GraftModel):
    """A DiT of ours, with whatever operators, behind the interface of diffusers' DiTTransformer2DModel."""

    family: ClassVar[type[RootstockConfig]] = DiTConfig
    attribute: ClassVar[str] = "dit"
    dit: DiT

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents (B,C,S,S), timesteps (B,) and labels (B,) -> noise, and variance if learned, (B,C_out,S,S).

        The pipeline's null class is 1000 whatever the model's: any label past the classes is the null class here.
        """
        assert timestep is not None and class_labels is not None
        condition = Condition(labels=class_labels.clamp(max=self.dit.config.num_classes))
        output = self.dit(hidden_states, timestep, condition)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
