"""The codec that turns images into latents and back."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graftwork.specs.data import Data
from graftwork.specs.fields import Spec, Unkeyed, WeightsPath
from graftwork.specs.training import Precision


class PixelCodec(Spec):
    """No encoder: the latents are the pixels, in [-1, 1]."""

    factor: ClassVar[int] = 1
    kind: Literal["pixel"] = "pixel"

    def latent_channels(self, data: Data) -> int:
        return data.channels


class VaeCodec(Spec):
    """diffusers' AutoencoderKL: a latent is a sample of the encoder's posterior, normalised as its config says."""

    kind: Literal["vae"] = "vae"
    path: Annotated[WeightsPath, Unkeyed()] = Field(
        "stabilityai/sd-vae-ft-ema", description="a folder, or a hub id; its content is in the key"
    )
    scale: Annotated[float | None, Unkeyed()] = Field(  # stands in the VAE's content, and is no other
        None, gt=0, description="of latents; left out: the VAE's own scaling_factor, beside which no other is accepted"
    )
    factor: int = Field(8, ge=1, description="pixels along a latent's side")
    channels: int = Field(4, ge=1, description="channels of a latent")
    precision: Precision = Field(
        "fp32", description="of its passes; bf16 rounds its weights too. On a CPU tf32 is fp32"
    )
    batch: int | None = Field(
        None, ge=1, description="images that pass through it together; left out: 16 on a CPU, 64 of 256 pixels on a GPU"
    )

    def latent_channels(self, data: Data) -> int:
        return self.channels


Codec = Annotated[PixelCodec | VaeCodec, Field(discriminator="kind")]
