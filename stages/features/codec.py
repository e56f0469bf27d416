"""The codec at work: images to latents and back, whatever its kind.

This file is read before a job starts, so it is light: torch and diffusers load with the VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork.specs.codec import Codec, PixelCodec, VaeCodec
from graftwork.specs.data import Data
from graftwork.specs.hub import is_hub_id, local_path, local_snapshot, missing_from
from graftwork.specs.vae import VaeConfig, vae_folder
from graftwork.stages.data.pixels import levels_of, scaled_levels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

BATCH = 16  # images that pass through the VAE together on a CPU
GPU_BATCH = 256  # at most so many on a GPU
GPU_SHARE = 0.2  # of a task's part of a GPU's memory, for the VAE's own activations
PIXEL_BYTES = 3600  # that decoding takes for each pixel of an image in fp32, by Stable Diffusion's VAE
GPU_BYTES = 80e9  # of a GPU that is yet to be seen
ACCEPTED = "a folder that diffusers saved an AutoencoderKL to, or the hub id of one"


class UnfitCodec(ValueError):
    """Files that hold no VAE, or another one than the spec says; the message is one line."""


class Coder(Protocol):
    """A codec, loaded. Pixels are (B,C,S,S); latents (B,C',S',S') with S' = S / factor."""

    def encode(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Images, uint8 or in [-1, 1] -> float32 latents; `names` are the images' own within their source."""
        ...

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents -> images, 0 .. 255."""
        ...


def load_codec(codec: Codec, device: torch.device, share: float = 1.0) -> Coder:
    """Return the spec's codec, ready on the device, of which the task has a share if it is a GPU; raise UnfitCodec."""
    return Pixels() if isinstance(codec, PixelCodec) else Vae(codec, device, share)


class Pixels:
    """Latents are the pixels."""

    def encode(self, images: Tensor, names: Sequence[str]) -> Tensor:
        return in_range(images)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        return to_images(latents)


class Vae:
    """diffusers' AutoencoderKL. What it makes of an image varies with those beside it only in the last bits."""

    def __init__(self, codec: VaeCodec, device: torch.device, share: float = 1.0) -> None:
        import torch

        self.codec, self.device = codec, device
        on_gpu = device.type == "cuda"
        self.room = share * torch.cuda.get_device_properties(device).total_memory if on_gpu else None
        self.dtype = torch.bfloat16 if codec.precision == "bf16" else torch.float32
        self.vae = _read(codec, self.dtype).to(device, memory_format=torch.channels_last).eval()
        self.latents = Normalisation(vae_config(codec))

    def encode(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Return a sample of the posterior, normalised; an image's noise comes from its name alone."""
        import torch

        from graftwork.models.numerics.precision import products

        batch = batch_size_for(self.codec, images.shape[-1], self.room)
        runs = [slice(start, start + batch) for start in range(0, len(images), batch)]
        with torch.no_grad(), products(self.codec.precision):
            return torch.cat([self._sampled(images[run], names[run]) for run in runs]).contiguous()

    def _sampled(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Of images that pass together; on a GPU it returns before that is done."""
        import torch

        from graftwork.models.numerics.streams import generator

        posterior = self.vae.encode(self._placed(images)).latent_dist
        mean, std = posterior.mean, torch.exp(0.5 * posterior.logvar.float())
        noise = [torch.randn(mean.shape[1:], generator=generator(0, "posterior", name)) for name in names]
        return self.latents.normalised(mean + std * self._sent(torch.stack(noise)))

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        import numpy as np
        import torch

        from graftwork.models.numerics.precision import products

        batch = batch_size_for(self.codec, latents.shape[-1] * self.codec.factor, self.room)
        with torch.no_grad(), products(self.codec.precision):
            parts = (self._placed(self.latents.own(part)) for part in latents.split(batch))
            return np.concatenate([to_images(self.vae.decode(part).sample.float()) for part in parts])

    def _placed(self, batch: Tensor) -> Tensor:
        import torch

        return in_range(self._sent(batch)).to(self.dtype, memory_format=torch.channels_last)

    def _sent(self, batch: Tensor) -> Tensor:
        """On the device; the host does not wait until a GPU has it."""
        upload = self.device.type == "cuda" and batch.device.type == "cpu"
        return (batch.pin_memory() if upload else batch).to(self.device, non_blocking=upload)


class Normalisation:
    """The latents that a model sees: scale * (z - shift), z being the VAE's own (B,C,S,S).

    As diffusers has it, scale is the VAE's scaling_factor over the standard deviation of its latents, and shift is
    their mean or its shift_factor. Deviations and means are of a channel; few VAEs have them.
    """

    def __init__(self, config: VaeConfig) -> None:
        self.scale: float | Tensor = config.scaling_factor
        self.shift: float | Tensor = config.shift_factor or 0.0
        if config.latents_std is not None:
            self.scale = config.scaling_factor / _of_channels(config.latents_std)
        if config.latents_mean is not None:
            self.shift = _of_channels(config.latents_mean)

    def normalised(self, z: Tensor) -> Tensor:
        scale, shift = self._beside(z)
        return scale * (z - shift)

    def own(self, latents: Tensor) -> Tensor:
        scale, shift = self._beside(latents)
        return latents / scale + shift

    def _beside(self, latents: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Return scale and shift on the device of the latents."""
        scale, shift = (
            value if isinstance(value, float) else value.to(latents.device) for value in (self.scale, self.shift)
        )
        return scale, shift


def _of_channels(numbers: Sequence[float]) -> Tensor:
    """Return (1,C,1,1)."""
    import torch

    return torch.tensor(numbers)[None, :, None, None]


def batch_size_for(codec: VaeCodec, side: int, room: float | None) -> int:
    """Return how many images, of so many pixels a side, pass through the VAE together.

    That is a setting, or what suits the device. room: bytes of a GPU that are the task's, None on a CPU.
    """
    if codec.batch is not None:
        return codec.batch
    if room is None:
        return BATCH
    fitting = max(1, int(GPU_SHARE * room / (PIXEL_BYTES * side**2)))
    return min(GPU_BATCH, 2 ** (fitting.bit_length() - 1))


def in_range(images: Tensor) -> Tensor:
    """Images as the codec takes them: float32 in [-1, 1]; uint8 are 0 .. 255."""
    return images if images.is_floating_point() else scaled_levels(images.float())


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels in [-1, 1] -> 0 .. 255, as the published sampler rounds them."""
    import torch

    return levels_of(pixels).clamp(0, 255).to(torch.uint8).contiguous().cpu().numpy()


def vae_place(codec: VaeCodec) -> Path | None:
    """Return the folder of the VAE if it is on this machine, and of a hub id all that is needed."""
    if is_hub_id(codec.path):
        snapshot = local_snapshot(codec.path)
        return vae_folder(snapshot) if snapshot is not None and not missing_from(snapshot, "vae") else None
    place = Path(codec.path)
    return vae_folder(place) if place.exists() else None


def vae_config(codec: VaeCodec) -> VaeConfig:
    """Return what the VAE, which is on this machine, says of itself; raise UnfitCodec."""
    place = vae_place(codec)
    if place is None:
        raise UnfitCodec(f"codec.path: got {codec.path!r}, no such folder; accepted: {ACCEPTED}")
    try:
        return VaeConfig.of(place)
    except ValueError as error:
        raise UnfitCodec(f"codec.path: got {codec.path!r}, {error}; accepted: {ACCEPTED}") from None


def misfits(codec: Codec, data: Data | None = None) -> list[str]:
    """A line for each setting that the VAE contradicts; none of a VAE that is not on this machine."""
    if isinstance(codec, PixelCodec) or vae_place(codec) is None:
        return []
    try:
        config = vae_config(codec)
    except UnfitCodec as unfit:
        return [str(unfit)]
    if config.kind != "AutoencoderKL":
        return [f"codec.path: got {codec.path!r}, a {config.kind}; accepted: {ACCEPTED}"]
    lines = [
        f"codec.{name}: got {asked}; accepted: {own}, as the VAE in {codec.path} has it"
        for name, asked, own in (
            ("factor", codec.factor, config.factor),
            ("channels", codec.channels, config.latent_channels),
            ("scale", codec.scale, config.scaling_factor),
        )
        if asked is not None and asked != own
    ]
    if data is not None and data.channels != config.in_channels:
        wanted = f"a VAE of images with {data.channels}, as the data has"
        lines.append(
            f"codec.path: got {codec.path!r}, of images with {config.in_channels} channels; accepted: {wanted}"
        )
    return lines


def require_fit(codec: Codec, data: Data | None = None) -> None:
    """Raise UnfitCodec where the VAE, fetched if need be, contradicts its spec, or is not there."""
    if isinstance(codec, VaeCodec):
        local_path(codec.path, "vae")
        vae_config(codec)
    lines = misfits(codec, data)
    if lines:
        raise UnfitCodec("; ".join(lines))


def _read(codec: VaeCodec, dtype: torch.dtype) -> Any:
    """Return diffusers' network with its weights; raise UnfitCodec."""
    require_fit(codec)
    from graftwork.models.checkpoints.errors import UnfitCheckpoint
    from graftwork.models.checkpoints.vae import read_vae

    try:
        return read_vae(vae_folder(local_path(codec.path, "vae")), dtype)
    except UnfitCheckpoint as unfit:
        raise UnfitCodec(str(unfit)) from None
