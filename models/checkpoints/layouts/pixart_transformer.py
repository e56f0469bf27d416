"""A graft as diffusers sees a PixArt: the model that PixArtSigmaPipeline samples from.

Importing this module is what lets `PixArtSigmaPipeline.from_pretrained` load such a model. diffusers' own class would
load the file as well, and put random weights wherever it has another operator: hence a class of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from graftwork.models.checkpoints.fit import Uninitialised
from graftwork.models.checkpoints.recognition import edits_from, edits_json, fields_of
from graftwork.models.condition import Condition
from graftwork.models.rootstocks.pixart import PixArt, PixArtConfig
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit


class GraftPixArtTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships types that mypy finds wrong
    """A PixArt of ours, with whatever operators, behind the interface of diffusers' PixArtTransformer2DModel."""

    @register_to_config
    def __init__(
        self,
        rootstock: dict[str, Any],
        edits: list[dict[str, Any]],
        sample_size: int,
        in_channels: int,
        out_channels: int,
    ) -> None:
        """rootstock, edits: a PixArtConfig and Edits, as JSON has them; the rest is what the pipeline looks for."""
        super().__init__()
        fields = {name: value for name, value in rootstock.items() if name != "kind"}
        self.pixart = graft(PixArt(PixArtConfig(**fields)), edits_from(edits), seed=0)

    @classmethod
    def around(cls, model: PixArt, edits: Sequence[Edit]) -> GraftPixArtTransformer2DModel:
        """Return the interface around this very model."""
        config = model.config
        with Uninitialised():
            transformer = cls(
                rootstock=fields_of(config),
                edits=edits_json(edits),
                sample_size=config.input_size,
                in_channels=config.in_channels,
                out_channels=config.out_channels,
            )
        transformer.pixart = model
        return transformer.eval()

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
