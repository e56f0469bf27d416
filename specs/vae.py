"""A VAE as diffusers saves it: what its config.json says, and which files its weights are in. No weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

STEM = "diffusion_pytorch_model"
Positive = Annotated[float, Field(gt=0)]


class VaeConfig(BaseModel):
    """What a VAE's own `config.json` says of its shape and its latents; what it leaves out is diffusers' default."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    kind: str = Field("AutoencoderKL", alias="_class_name")
    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    scaling_factor: Positive = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _one_shift_a_channel(self) -> Self:
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ValueError(f"{name} has {len(numbers)} numbers for {self.latent_channels} channels")
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ValueError("both shift_factor and latents_mean are there, each of which would shift the latents")
        return self

    @property
    def factor(self) -> int:
        """Pixels along a latent's side: each level of blocks but the last halves the image's."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def is_scaled_only(self) -> bool:
        """Whether a latent is the VAE's own times `scaling_factor`, and nothing else."""
        return not self.shift_factor and self.latents_mean is None and self.latents_std is None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return that of a VAE's folder; raise ValueError, with the end of "a folder ..", if it is of another kind."""
        try:
            return cls.model_validate_json((folder / "config.json").read_bytes())
        except (OSError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
        if first is None or first["type"] == "json_invalid":
            raise ValueError("with no VAE's config.json in it")
        problem = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"in whose config.json {'.'.join(map(str, first['loc'])) or 'something'} is wrong: {problem}")


def vae_folder(place: Path) -> Path:
    """Where in a folder a VAE lies: in itself, or in the `vae` of a saved pipeline."""
    within = place / "vae"
    return within if (within / "config.json").is_file() and not (place / "config.json").is_file() else place


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights, all of which need not be there."""

    files: tuple[Path, ...]
    safe: bool = True  # safetensors, not torch's pickles
    variant: str | None = None  # as fp16

    @property
    def missing(self) -> list[str]:
        return [file.name for file in self.files if not file.is_file()]


def weight_files(folder: Path) -> WeightFiles:
    """Return the files of the weights. Those of no variant, and safetensors, are preferred.

    Raise ValueError if there are none, or if there are several variants and nothing chooses between them.
    """
    candidates = sorted(_weight_files(folder), key=lambda one: (one.variant or "", not one.safe, len(one.files)))
    if not candidates:
        raise ValueError(f"has no {STEM}.safetensors or .bin, in one file or with an index")
    variants = {one.variant for one in candidates}
    if None not in variants and len(variants) > 1:
        raise ValueError(f"has weights of the variants {', '.join(sorted(map(str, variants)))} only, and not just one")
    return candidates[0]


def _weight_files(folder: Path) -> Iterator[WeightFiles]:
    for file in folder.glob(f"{STEM}.*"):
        if re.search(r"-\d+-of-\d+\.", file.name):  # a part, which an index names
            continue
        if single := re.fullmatch(rf"{STEM}(?:\.([\w-]+))?\.(safetensors|bin)", file.name):
            yield WeightFiles((file,), single[2] == "safetensors", single[1])
        elif index := re.fullmatch(rf"{STEM}\.(safetensors|bin)\.index(?:\.([\w-]+))?\.json", file.name):
            yield WeightFiles(shards(file), index[1] == "safetensors", index[2])


def shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index names beside itself; raise ValueError where it is none."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index.name} is no index of files beside it") from None
    return tuple(index.with_name(name) for name in names)
