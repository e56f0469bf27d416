"""What grafts have in common as models of diffusers: how they are made, saved and loaded.

Beside the weights lies a file of two lines that imports the class: with `trust_remote_code=True` diffusers finds it by
that, in AutoModel and in pipelines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from graftwork.models.checkpoints.fit import Uninitialised
from graftwork.models.checkpoints.recognition import edits_from, edits_json, fields_of
from graftwork.models.rootstocks import Rootstock, RootstockConfig, new_rootstock
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit

CODE, MAP = "graft_model", "auto_map"  # the file, without .py, and where config.json names it


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

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write config.json as diffusers does, and the file by which it finds this class."""
        super().save_config(save_directory, push_to_hub, **options)
        folder, name = Path(save_directory), type(self).__name__
        config = json.loads((folder / self.config_name).read_text())
        config[MAP] = {"AutoModel": f"{CODE}.{name}"}
        (folder / self.config_name).write_text(json.dumps(config, indent=2) + "\n")
        line = f"from {type(self).__module__} import {name}  # noqa: F401"
        (folder / f"{CODE}.py").write_text(f'"""The class of this model, which is part of graftwork."""\n\n{line}\n')

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return what __init__ takes of a config; of what `save_config` added diffusers would warn."""
        return super().extract_init_dict({key: value for key, value in config_dict.items() if key != MAP}, **options)

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
