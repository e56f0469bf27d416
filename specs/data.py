"""Where images come from, and the codec that turns them into latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from specs.fields import Spec, Unkeyed


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits: 8x8, one channel, 10 classes, enlarged bilinearly."""

    kind: Literal["digits"] = "digits"
    image_size: int = Field(16, ge=8, le=64, multiple_of=8, description="pixels a side")
    heldout: float = Field(0.5, gt=0, lt=1, description="share of each class kept from training")


class ImageFolderData(Spec):
    """A folder with one folder of images a class; classes are numbered in the order of their names."""

    kind: Literal["image_folder"] = "image_folder"
    path: Annotated[str, Unkeyed()]  # its files are in the key
    image_size: int = Field(256, ge=8, description="pixels a side, after scaling the short side and a centre crop")
    heldout: float = Field(0.1, gt=0, lt=1, description="share of each class kept from training")


Data = Annotated[DigitsData | ImageFolderData, Field(discriminator="kind")]


class PixelCodec(Spec):
    """No encoder: the latents are the pixels, in [-1, 1]."""

    kind: Literal["pixel"] = "pixel"


Codec = PixelCodec
