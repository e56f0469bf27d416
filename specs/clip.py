"""The CLIP that judges how near samples are to their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.fields import Spec, Unkeyed, WeightsPath


class ClipSpec(Spec):
    """A CLIP with its tokenizer and image processor, read by transformers."""

    model_types: ClassVar[Mapping[str, tuple[str, ...]]] = {"path": ("clip",)}  # in its config.json
    kind: Literal["clip"] = "clip"
    # Its content is in the key.
    path: Annotated[WeightsPath, Unkeyed()] = Field(
        description="a folder or hub id, as openai/clip-vit-base-patch16 or openai/clip-vit-large-patch14"
    )

    def weights(self) -> Mapping[str, str]:
        """Return the files that it reads, by its fields."""
        return {"path": self.path}
