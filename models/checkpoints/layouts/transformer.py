"""A graft as diffusers sees a DiT: the model that DiTPipeline samples from.

Importing this module is what lets `DiTPipeline.from_pretrained` load such a model: diffusers imports no module just
because a folder names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from graftwork.models.checkpoints.fit import Uninitialised
from graftwork.models.checkpoints.recognition import edits_from, edits_json
from graftwork.models.condition import Condition
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit


class GraftTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships types that mypy finds wrong
    """A DiT of ours, with whatever operators, behind the interface of diffusers' DiTTransformer2DModel."""

    @register_to_config
    def __init__(
        self,
        rootstock: dict[str, Any],
        edits: list[dict[str, Any]],
        sample_size: int,
        in_channels: int,
        out_channels: int,
    ) -> None:
        """rootstock, edits: a DiTConfig and Edits, as JSON has them; the rest is what DiTPipeline looks for."""
        super().__init__()
        self.dit = graft(DiT(DiTConfig(**rootstock)), edits_from(edits), seed=0)

    @classmethod
    def around(cls, model: DiT, edits: Sequence[Edit]) -> GraftTransformer2DModel:
        """The interface around this very model."""
        config = model.config
        with Uninitialised():
            transformer = cls(
                rootstock=asdict(config),
                edits=edits_json(edits),
                sample_size=config.input_size,
                in_channels=config.in_channels,
                out_channels=config.out_channels,
            )
        transformer.dit = model
        return transformer.eval()

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
