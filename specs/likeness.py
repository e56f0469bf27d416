"""How near the samples of a graft are to its rootstock's of the same noise: on which samples, and by which networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.clip import ClipSpec
from graftwork.specs.fields import KeyedIfSet, Spec, Unkeyed, WeightsPath


class DinoSpec(Spec):
    """A DINO with its image processor, read by transformers: the first one, DINOv2 or DINOv3, as a ViT."""

    # In its config.json; that of the first DINO says what any ViT's does.
    model_types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "path": ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
    }
    kind: Literal["dino"] = "dino"
    # Its content is in the key.
    path: Annotated[WeightsPath, Unkeyed()] = Field(
        description="a folder or hub id, as facebook/dinov2-base or facebook/dino-vitb16"
    )

    def weights(self) -> Mapping[str, str]:
        """Return the files that it reads, by its fields."""
        return {"path": self.path}


class LikenessSpec(Spec):
    """On which samples likeness to the rootstock is measured, and by which networks beside PSNR, which needs none.

    LPIPS is not measured.
    """

    samples: int = Field(
        1000,
        ge=2,
        description="of each row, the first ones, or all if there are fewer. Each row keeps their images, 3 bytes a "
        "pixel: 197 MB for 1,000 of 256 pixels a side",
    )
    dino: Annotated[DinoSpec | None, KeyedIfSet()] = Field(
        None, description="a DINO, for the cosine of its vectors of both images"
    )
    clip: Annotated[ClipSpec | None, KeyedIfSet()] = Field(
        None, description="a CLIP, for the cosine of its vectors of both images"
    )

    def networks(self) -> Mapping[str, DinoSpec | ClipSpec]:
        """Return the networks that it names, by their fields."""
        named = {"dino": self.dino, "clip": self.clip}
        return {field: network for field, network in named.items() if network is not None}
