"""Where images come from, and the codec that turns them into latents."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.fields import LocalPath, Spec, Unkeyed, WeightsPath

PER_CLASS = "training images kept of each class, the first by a hash of their names; left out: all of them"


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits: 8x8, one channel, 10 classes, enlarged bilinearly."""

    channels: ClassVar[int] = 1
    classes: ClassVar[int] = 10
    flip: ClassVar[bool] = False  # a digit's mirror image is none
    skip_broken: ClassVar[bool] = False
    kind: Literal["digits"] = "digits"
    image_size: int = Field(16, ge=8, le=64, multiple_of=8, description="pixels a side")
    heldout: float = Field(0.5, gt=0, lt=1, description="share of each class kept from training")
    per_class: int | None = Field(None, ge=1, description=PER_CLASS)


class ImageFolderData(Spec):
    """A folder with one folder of images a class; classes are numbered in the order of their names."""

    channels: ClassVar[int] = 3
    kind: Literal["image_folder"] = "image_folder"
    path: Annotated[LocalPath, Unkeyed()]  # its files are in the key
    classes: Annotated[int | None, Unkeyed()] = Field(
        None, ge=1, description="how many classes there must be; with it a plan needs no images"
    )
    image_size: int = Field(
        256, ge=8, le=8192, description="pixels a side, after scaling the short side and a centre crop"
    )
    heldout: float = Field(0.1, gt=0, lt=1, description="share of each class kept from training")
    per_class: int | None = Field(None, ge=1, description=PER_CLASS)
    flip: bool = Field(
        False, description="also encode each training image's mirror image; training draws which of the two it sees"
    )
    skip_broken: bool = Field(
        False, description="leave out, and count, the images that cannot be read; they are an error otherwise"
    )


Data = Annotated[DigitsData | ImageFolderData, Field(discriminator="kind")]


class PixelCodec(Spec):
    """No encoder: the latents are the pixels, in [-1, 1]."""

    factor: ClassVar[int] = 1
    kind: Literal["pixel"] = "pixel"

    def latent_channels(self, data: Data) -> int:
        return data.channels


class VaeCodec(Spec):
    """diffusers' AutoencoderKL: a latent is a sample of the encoder's posterior, times `scale`."""

    kind: Literal["vae"] = "vae"
    path: Annotated[WeightsPath, Unkeyed()] = Field(
        "stabilityai/sd-vae-ft-ema", description="a folder, or a hub id; its content is in the key"
    )
    scale: float = Field(0.18215, gt=0)
    factor: int = Field(8, ge=1, description="pixels along a latent's side")
    channels: int = Field(4, ge=1, description="channels of a latent")
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int | None = Field(
        None, ge=1, description="images that pass through it together; left out: 16 on a CPU, 64 of 256 pixels on a GPU"
    )

    def latent_channels(self, data: Data) -> int:
        return self.channels


Codec = Annotated[PixelCodec | VaeCodec, Field(discriminator="kind")]
