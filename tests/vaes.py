"""A small VAE, as diffusers saves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from graftwork.models.numerics.streams import initialising

SIDE = 16  # pixels of its images; latents have half
SHAPE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": SIDE,
}


def make_vae(folder: Path, *, seed: int = 0, safe: bool = True, **changes: Any) -> Path:
    """Write a VAE of two levels, with SHAPE but for the changes; return its folder."""
    with initialising(seed, "vae"):
        vae = AutoencoderKL(**{**SHAPE, **changes})
    vae.save_pretrained(folder, safe_serialization=safe)
    return folder
