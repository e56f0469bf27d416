"""The artifact of `features`, as the other stages read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.diffusion import STEPS, Diffusion
from models.dit import DiTConfig
from models.streams import generator
from specs.model import DitModel

SPLITS = ("training", "heldout")


class LatentsMeta(BaseModel):
    """What the latents are; `meta.json`."""

    model_config = ConfigDict(frozen=True)
    codec: str
    scale: float = 1.0  # latents are the codec's own, times this
    channels: int
    side: int
    classes: tuple[str, ...]
    num_training: int
    num_heldout: int

    @property
    def bounded(self) -> bool:
        """Whether latents lie in [-1, 1]: pixels do."""
        return self.codec == "pixel"

    def dit_config(self, model: DitModel) -> DiTConfig:
        """The model that the spec describes, for these latents."""
        return DiTConfig(
            input_size=self.side,
            in_channels=self.channels,
            patch=model.patch,
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            num_classes=len(self.classes),
            learn_sigma=model.learn_sigma,
        )


@dataclass(frozen=True)
class Latents:
    """One split, in an order in which every prefix is class-stratified."""

    x: Tensor  # (n,C,S,S) float32
    labels: Tensor  # (n,)

    def first(self, count: int) -> Latents:
        return Latents(self.x[:count], self.labels[:count])

    def share(self, fraction: float) -> Latents:
        """The same share of each class; at least one latent."""
        return self.first(max(1, round(len(self.x) * fraction)))


def read_meta(folder: Path) -> LatentsMeta:
    return LatentsMeta.model_validate_json((folder / "meta.json").read_text())


def write_meta(folder: Path, meta: LatentsMeta) -> None:
    (folder / "meta.json").write_text(json.dumps(meta.model_dump(mode="json"), indent=1))


def read(folder: Path, split: str) -> Latents:
    """A split, memory-mapped."""
    x = np.load(folder / f"{split}_latents.npy", mmap_mode="c")
    return Latents(torch.from_numpy(x), torch.from_numpy(np.load(folder / f"{split}_labels.npy")))


@dataclass(frozen=True)
class Noised:
    """Latents with noise at uniformly drawn timesteps: what the rootstock is shown."""

    z: Tensor  # (n,C,S,S)
    t: Tensor  # (n,)
    labels: Tensor  # (n,)

    def __getitem__(self, chosen: Tensor) -> Noised:
        return Noised(self.z[chosen], self.t[chosen], self.labels[chosen])


def noised(latents: Latents, draws: int, seed: int, stream: str) -> Noised:
    """Each latent at `draws` uniform timesteps with noise of its own; a sample's draws depend on its place alone."""
    t, noise = [], []
    for index in range(len(latents.x)):
        source = generator(seed, stream, index)
        t.append(torch.randint(STEPS, (draws,), generator=source))
        noise.append(torch.randn((draws, *latents.x.shape[1:]), generator=source))
    x, times = latents.x.repeat_interleave(draws, 0), torch.cat(t)
    return Noised(Diffusion().add_noise(x, times, torch.cat(noise)), times, latents.labels.repeat_interleave(draws, 0))
