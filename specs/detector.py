"""What finds the objects in samples, for GenEval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.fields import Spec, Unkeyed, WeightsPath


class Mask2FormerSpec(Spec):
    """Mask2Former on COCO, and CLIP for colours: the published detector's architecture, read by transformers."""

    # In their config.json.
    model_types: ClassVar[Mapping[str, tuple[str, ...]]] = {"path": ("mask2former",), "colours": ("clip",)}
    kind: Literal["mask2former"] = "mask2former"
    # The content of both is in the key.
    path: Annotated[WeightsPath, Unkeyed()] = Field(
        description="a folder or hub id, as facebook/mask2former-swin-small-coco-instance"
    )
    colours: Annotated[WeightsPath, Unkeyed()] = Field(
        description="a CLIP that names colours: a folder or hub id, as openai/clip-vit-large-patch14"
    )

    def weights(self) -> Mapping[str, str]:
        """Return the files that it reads, by its fields."""
        return {"path": self.path, "colours": self.colours}


class ShapesSpec(Spec):
    """Rules that find squares, crosses, triangles and rings in four colours, of scenes as our testbed's."""

    model_types: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    side: ClassVar[int] = 16  # pixels of a scene
    kind: Literal["shapes"] = "shapes"

    def weights(self) -> Mapping[str, str]:
        """Return the files that it reads: none."""
        return {}


Detector = Annotated[Mask2FormerSpec | ShapesSpec, Field(discriminator="kind")]
