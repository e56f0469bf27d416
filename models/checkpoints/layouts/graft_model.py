"""What grafts have in common as models of diffusers: how they are made, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from graftwork.models.checkpoints.fit import Uninitialised
from graftwork.models.checkpoints.recognition import edits_from, edits_json, fields_of
from graftwork.models.rootstocks import Rootstock, RootstockConfig, new_rootstock
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit


class GraftModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships types that mypy finds wrong
    """A model of ours, with whatever operators; a class below it has the interface of a model of diffusers'."""

    family: ClassVar[type[RootstockConfig]]
    attribute: ClassVar[str]  # that has the model: its tensors' names begin with it

    @register_to_config
    def __init__(
        self,
        rootstock: dict[str, Any],
        edits: list[dict[str, Any]],
        sample_size: int,
        in_channels: int,
        out_channels: int,
    ) -> None:
        """rootstock, edits: a config of the family and Edits, as JSON has them; the rest is what pipelines look for."""
        super().__init__()
        config = self.family(**{name: value for name, value in rootstock.items() if name != "kind"})
        setattr(self, self.attribute, graft(new_rootstock(config), edits_from(edits), seed=0))

    @classmethod
    def around(cls, model: Rootstock, edits: Sequence[Edit]) -> Self:
        """Return the interface around this very model."""
        config = model.config
        channels, side = config.latent_shape[:2]
        with Uninitialised():
            transformer = cls(
                rootstock=fields_of(config),
                edits=edits_json(edits),
                sample_size=side,
                in_channels=channels,
                out_channels=channels * (2 if config.learn_sigma else 1),
            )
        setattr(transformer, cls.attribute, model)
        transformer.eval()
        return transformer
