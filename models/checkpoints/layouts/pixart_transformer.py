"""A graft as diffusers sees a PixArt: the model that PixArtSigmaPipeline samples from.

Importing this module is what lets `PixArtSigmaPipeline.from_pretrained` load such a model. diffusers' own class would
load the file as well, and put random weights wherever it has another operator: hence a class of ours.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look here
from torch import Tensor

from graftwork.models.checkpoints.layouts.graft_model import GraftModel
from graftwork.models.condition import Condition
from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.rootstocks.pixart import PixArt, PixArtConfig


class GraftPixArtTransformer2DModel(GraftModel):
    """A PixArt of ours, with whatever operators, behind the interface of diffusers' PixArtTransformer2DModel."""

    family: ClassVar[type[RootstockConfig]] = PixArtConfig
    attribute: ClassVar[str] = "pixart"
    pixart: PixArt

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents (B,C,S,S), states of a text (B,L,E), its mask (B,L), timesteps (B,) -> noise and variance (B,2C,S,S).

        added_cond_kwargs: sizes and aspect ratios, which a PixArt-Sigma is not told.
        """
        assert timestep is not None and encoder_hidden_states is not None
        condition = Condition(text=encoder_hidden_states, mask=encoder_attention_mask)
        output = self.pixart(hidden_states, timestep, condition)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
