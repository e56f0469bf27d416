"""The codec at work: images to latents and back, whatever its kind.

This file is read before a job starts, so it is light: torch and diffusers load with the VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, Field, ValidationError

from graftwork.specs.data import Codec, Data, PixelCodec, VaeCodec
from graftwork.specs.hub import is_hub_id, local_path, local_snapshot, vae_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

BATCH = 16  # images that pass through the VAE together on a CPU
GPU_BATCH, GPU_PIXELS = 256, 64 * 256**2  # on a GPU: at most so many images, and pixels of images
SHOWN = 10  # tensors that an error names at most
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


def load_codec(codec: Codec, device: torch.device) -> Coder:
    """The spec's codec, ready on the device; raises UnfitCodec."""
    return Pixels() if isinstance(codec, PixelCodec) else Vae(codec, device)


class Pixels:
    """Latents are the pixels."""

    def encode(self, images: Tensor, names: Sequence[str]) -> Tensor:
        return in_range(images)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        return to_images(latents)


class Vae:
    """diffusers' AutoencoderKL. What it makes of an image varies with those beside it only in the last bits."""

    def __init__(self, codec: VaeCodec, device: torch.device) -> None:
        import torch

        self.codec, self.scale, self.device = codec, codec.scale, device
        self.dtype = torch.bfloat16 if codec.precision == "bf16" else torch.float32
        self.vae = _read(codec, self.dtype).to(device, memory_format=torch.channels_last).eval()

    def encode(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """scale * a sample of the posterior; an image's noise comes from its name alone."""
        import torch

        batch = together(self.codec, images.shape[-1], self.device.type == "cuda")
        runs = [slice(start, start + batch) for start in range(0, len(images), batch)]
        with torch.no_grad():
            return torch.cat([self._sampled(images[run], names[run]) for run in runs]).contiguous()

    def _sampled(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Of images that pass together; on a GPU it returns before that is done."""
        import torch

        from graftwork.models.streams import generator

        posterior = self.vae.encode(self._placed(images)).latent_dist
        mean, std = posterior.mean, torch.exp(0.5 * posterior.logvar.float())
        noise = [torch.randn(mean.shape[1:], generator=generator(0, "posterior", name)) for name in names]
        return self.scale * (mean + std * self._sent(torch.stack(noise)))

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        import numpy as np
        import torch

        batch = together(self.codec, latents.shape[-1] * self.codec.factor, self.device.type == "cuda")
        with torch.no_grad():
            parts = (self._placed(part / self.scale) for part in latents.split(batch))
            return np.concatenate([to_images(self.vae.decode(part).sample.float()) for part in parts])

    def _placed(self, batch: Tensor) -> Tensor:
        import torch

        return in_range(self._sent(batch)).to(self.dtype, memory_format=torch.channels_last)

    def _sent(self, batch: Tensor) -> Tensor:
        """On the device; the host does not wait until a GPU has it."""
        upload = self.device.type == "cuda" and batch.device.type == "cpu"
        return (batch.pin_memory() if upload else batch).to(self.device, non_blocking=upload)


def together(codec: VaeCodec, side: int, on_gpu: bool) -> int:
    """How many images, of so many pixels a side, pass through the VAE together: a setting, or what suits the device."""
    if codec.batch is not None:
        return codec.batch
    return min(GPU_BATCH, max(1, GPU_PIXELS // side**2)) if on_gpu else BATCH


def in_range(images: Tensor) -> Tensor:
    """Images as the codec takes them: float32 in [-1, 1]; uint8 are 0 .. 255."""
    return images if images.is_floating_point() else images.float().div(127.5).sub(1)


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels in [-1, 1] -> 0 .. 255, as the published sampler rounds them."""
    import torch

    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).contiguous().cpu().numpy()


class VaeConfig(BaseModel):
    """What a VAE's own `config.json` says of its shape; what it leaves out is diffusers' default."""

    kind: str = Field("AutoencoderKL", alias="_class_name")
    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)

    @property
    def factor(self) -> int:
        """Each level of blocks but the last halves the side."""
        return 2 ** (len(self.block_out_channels) - 1)


def misfits(codec: Codec, data: Data | None = None) -> list[str]:
    """A line for each setting that the VAE contradicts; none of a VAE that is not on this machine."""
    if isinstance(codec, PixelCodec):
        return []
    place = local_snapshot(codec.path) if is_hub_id(codec.path) else Path(codec.path)
    if place is None or not place.exists():
        return []
    try:
        config = VaeConfig.model_validate_json((vae_folder(place) / "config.json").read_bytes())
    except (OSError, ValidationError):
        return [f"codec.path: got {codec.path!r}, with no VAE's config.json in it; accepted: {ACCEPTED}"]
    if config.kind != "AutoencoderKL":
        return [f"codec.path: got {codec.path!r}, a {config.kind}; accepted: {ACCEPTED}"]
    lines = [
        f"codec.{name}: got {given}; accepted: {own}, as the VAE in {codec.path} has it"
        for name, given, own in (
            ("factor", codec.factor, config.factor),
            ("channels", codec.channels, config.latent_channels),
        )
        if given != own
    ]
    if data is not None and data.channels != config.in_channels:
        wanted = f"a VAE of images with {data.channels}, as the data has"
        lines.append(
            f"codec.path: got {codec.path!r}, of images with {config.in_channels} channels; accepted: {wanted}"
        )
    return lines


def require_fit(codec: Codec, data: Data | None = None) -> None:
    """Raise UnfitCodec where the VAE, fetched if need be, contradicts its spec, or is not there."""
    if isinstance(codec, VaeCodec) and not local_path(codec.path).exists():
        raise UnfitCodec(f"codec.path: got {codec.path!r}, no such folder; accepted: {ACCEPTED}")
    lines = misfits(codec, data)
    if lines:
        raise UnfitCodec("; ".join(lines))


def _read(codec: VaeCodec, dtype: torch.dtype) -> Any:
    """diffusers' network with the weights that lie beside its config.json: safetensors, or tensors only."""
    require_fit(codec)
    from diffusers import AutoencoderKL

    folder = vae_folder(local_path(codec.path))
    try:
        vae, told = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UnfitCodec(f"{folder}: cannot be read as a VAE: {' '.join(str(error).split())[:300]}") from None
    problems = [f"{name}: missing" for name in told["missing_keys"]]
    problems += [f"{name}: none of that name expected" for name in told["unexpected_keys"]]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UnfitCodec(f"{folder}: does not fit its config.json: {'; '.join(sorted(problems)[:SHOWN])}{more}")
    for name, value in vae.state_dict().items():
        if not value.isfinite().all():
            raise UnfitCodec(f"{folder}: {name}: holds NaN or infinity, expected numbers")
    return vae
