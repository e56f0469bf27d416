"""`synthesis`: the rootstock draws the latents that everything is trained on, each of one of the prompts.

Batches are drawn wherever the cluster has room; sample i has noise of its own, whoever draws it. A shard that is whole
is kept, and not drawn again after a kill or a stop. Nothing passes through a VAE but the few samples of the picture.
Leaves what `stages.artifacts.latents` reads, and `grid.png`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from graftwork.cluster.fan_out import fan_out
from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import computing
from graftwork.models.numerics.streams import seed_of
from graftwork.models.rootstocks import Rootstock
from graftwork.stages.artifacts.hybrids import load_model
from graftwork.stages.artifacts.latents import NUMBERS, SPLITS, ShardWriter, read_meta
from graftwork.stages.artifacts.texts import told
from graftwork.stages.catalog.synthesis import SynthesisParams
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.samples import draw
from graftwork.stages.features.codec import load_codec
from graftwork.stages.features.features import link

SHARD = 128  # samples: a kill loses at most those of the shards under way
META = "meta.json"


@dataclass(frozen=True)
class Batch:
    """Samples that are drawn together, all of one shard."""

    numbers: tuple[int, ...]  # which of all samples they are
    labels: tuple[int, ...]  # of their prompts


@dataclass(frozen=True)
class Shard:
    """Samples that follow each other in a split, in one file."""

    file: str
    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        """How many samples it has."""
        return sum(len(batch.numbers) for batch in self.batches)


def run(context: Context) -> None:
    features = context.input("features")
    meta = read_meta(features)
    shutil.copyfile(features / META, context.out / META)
    for split in SPLITS:
        shutil.copyfile(features / f"{split}_labels.npy", context.out / f"{split}_labels.npy")
    wanted = [shard for split in SPLITS for shard in shards(features, split, context.params.batch)]
    draw_shards(context, wanted, meta.shape)
    _picture(context, wanted[0])


def shards(features: Path, split: str, batch: int) -> list[Shard]:
    """Return the shards of a split; at least one, so that an empty split has a file as well."""
    numbers, labels = (np.load(features / f"{split}_{name}").tolist() for name in (NUMBERS, "labels.npy"))
    in_order = []
    for number, start in enumerate(range(0, max(1, len(numbers)), SHARD)):
        stop = min(start + SHARD, len(numbers))
        parts = [slice(first, min(first + batch, stop)) for first in range(start, stop, batch)]
        batches = tuple(Batch(tuple(numbers[part]), tuple(labels[part])) for part in parts)
        in_order.append(Shard(f"{split}_latents-{number:05d}.npy", batches))
    return in_order


def draw_shards(context: Context, wanted: Sequence[Shard], shape: Sequence[int]) -> None:
    """Have each shard's file in the step's folder: as it was kept, or drawn now and kept when it is whole."""
    missing = [shard for shard in wanted if not _take(shard.file, context)]
    total, left = (sum(shard.size for shard in some) for some in (wanted, missing))
    context.report(total - left, total)
    drawn = fan_out(draw_batch, context, [batch for shard in missing for batch in shard.batches], context.resources)
    for shard in missing:
        place = context.out / shard.file
        writer, start = ShardWriter(place, (shard.size, *shape)), 0
        for _ in shard.batches:
            latents = next(drawn)
            writer.write(start, latents)
            start += len(latents)
            left -= len(latents)
            context.report(total - left, total)
            if start < shard.size:  # a shard takes minutes; one that is whole is kept first
                context.stop_if_asked()
        context.partial.save(shard.file, partial(link, place))
        context.stop_if_asked()


def _take(file: str, context: Context) -> bool:
    """Have a shard that was kept in the step's folder; False where it has to be drawn."""
    if (path := context.partial.load(file)) is None:
        return False
    link(path, context.out / file)
    return True


def draw_batch(context: Context, batch: Batch, device: torch.device) -> NDArray[np.float32]:
    """Return latents (n,C,..)."""
    params: SynthesisParams = context.params
    model, meta = _rootstock(context, device), read_meta(context.input("features"))
    # A seed of its own: the samples of the table's rows are of other noise.
    seed = seed_of(params.seed, "synthesis")
    condition = Condition(labels=torch.tensor(batch.labels))
    with computing(params.precision, device):
        latents = draw(model, model, meta, batch.numbers, condition, params.sampler, seed, device)
    if not latents.isfinite().all():
        raise FloatingPointError(f"the rootstock's samples of {len(batch.numbers)} prompts are no finite numbers")
    return latents.float().cpu().numpy()


_LOADED: dict[tuple[str, ...], Rootstock] = {}


def _rootstock(context: Context, device: torch.device) -> Rootstock:
    """Return the model, which a process that draws several batches loads once."""
    identity = (context.inputs["base"].key, *(one.key for role, one in context.inputs.items() if role == "text"))
    if identity not in _LOADED:
        _LOADED.clear()
        model, _ = load_model(context.inputs, "base")
        _LOADED[identity] = told(model, context.inputs).to(device).eval()
    return _LOADED[identity]


def _picture(context: Context, shard: Shard) -> None:
    from graftwork.stages.pictures.pictures import CELLS, sample_grid  # matplotlib, which the workers do not need

    latents = np.load(context.out / shard.file, mmap_mode="r")[:CELLS]
    (images,) = fan_out(decode, context, [np.array(latents)], context.resources)
    labels = [label for batch in shard.batches for label in batch.labels][: len(images)]
    names = read_meta(context.input("features")).classes
    sample_grid(images, [names[label] for label in labels], "drawn by the rootstock", context.out / "grid")


def decode(context: Context, latents: NDArray[np.float32], device: torch.device) -> NDArray[np.uint8]:
    """Return the images (n,C,S,S) of latents."""
    params: SynthesisParams = context.params
    codec = load_codec(params.codec, device, min(context.resources.gpu, 1.0))
    images: NDArray[np.uint8] = codec.decode(torch.from_numpy(latents).to(device))
    return images
