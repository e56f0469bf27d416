"""`features`: images to latents, streamed through Ray Data; training and held-out, class by class in turn.

Leaves `{training,heldout}_latents.npy` (n,C,S,S) float32, `{training,heldout}_labels.npy` (n,) and `meta.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import ray.data
import torch

from cluster.runtime import options, settle
from specs.data import Data, ImageFolderData, PixelCodec, VaeCodec
from specs.job import StepResources
from specs.steps import FeaturesParams
from stages import Context
from stages.codec import BATCH, Coder, UnfitCodec, load_codec, require_fit
from stages.latents import SPLITS, LatentsMeta, write_meta
from stages.sources import Item, class_folders, read_image, split

BATCHES_A_TASK = 8
Batch = dict[str, Any]  # a row of Ray's data set: `split`, `start`, `names`, and `images`, encoded in the end


def run(context: Context) -> None:
    params: FeaturesParams = context.params
    data, codec = params.data, params.codec
    require_fit(codec, data)
    splits = dict(zip(SPLITS, split(data), strict=True))
    channels, side = codec.latent_channels(data), data.image_size // codec.factor
    latents = {}
    for name, items in splits.items():
        np.save(context.out / f"{name}_labels.npy", np.array([item.label for item in items], dtype=np.int64))
        path, shape = context.out / f"{name}_latents.npy", (len(items), channels, side, side)
        latents[name] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    total, done = sum(map(len, splits.values())), 0
    context.report(0, total)
    for batch in _as_raised(_encoded(params, splits, context.resources)):
        start, count = batch["start"], len(batch["images"])
        latents[batch["split"]][start : start + count] = batch["images"]
        done += count
        context.report(done, total)
        context.stop_if_asked()
    for part in latents.values():
        part.flush()
    meta = LatentsMeta(
        codec=codec.kind,
        scale=codec.scale if isinstance(codec, VaeCodec) else 1.0,
        channels=channels,
        side=side,
        classes=_class_names(data),
        num_training=len(splits["training"]),
        num_heldout=len(splits["heldout"]),
    )
    write_meta(context.out, meta)


def _encoded(params: FeaturesParams, splits: dict[str, list[Item]], resources: StepResources) -> Iterator[Batch]:
    """The batches, encoded, in whatever order they are ready.

    Which images pass through the VAE together is settled here, and not by how Ray cuts the data for the workers that
    it happens to have: so not even the last bits depend on those.
    """

    def read(batch: Batch) -> Batch:  # in here, so that a worker that only reads need not load torch with this module
        return {**batch, "images": np.stack([read_image(data, name) for name in batch["names"]])}

    data, encode = params.data, {name: value for name, value in options(resources).items() if value}
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.raise_original_map_exception = False, True
    batches = [
        {"split": name, "start": start, "names": [item.name for item in items[start : start + BATCH]]}
        for name, items in splits.items()
        for start in range(0, len(items), BATCH)
    ]
    num_tasks = math.ceil(len(batches) / BATCHES_A_TASK)
    rows = ray.data.from_items(batches, override_num_blocks=num_tasks)
    if isinstance(params.codec, PixelCodec):
        return iter(rows.map(read, **encode).iter_rows())
    # Without a GPU Ray fuses the two, so that a worker reads what it encodes and one CPU is enough.
    images = rows.map(read, num_cpus=1 if resources.gpu else resources.cpu)
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=num_tasks)
    return iter(images.map(Encoder, fn_constructor_args=(params.codec,), compute=workers, **encode).iter_rows())


def _as_raised(batches: Iterator[Batch]) -> Iterator[Batch]:
    """What a worker says of an image or of the VAE, without the advice on retries that Ray puts below it."""
    try:
        yield from batches
    except ray.exceptions.RayTaskError as error:
        if type(error.cause) in (ValueError, UnfitCodec):
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise


class Encoder:
    """A worker that holds the VAE."""

    def __init__(self, codec: VaeCodec) -> None:
        self.codec = codec

    def __call__(self, batch: Batch) -> Batch:
        settle()
        latents = self._vae.encode(torch.from_numpy(np.array(batch["images"])), batch["names"])
        return {**batch, "images": latents.cpu().numpy()}

    @cached_property
    def _vae(self) -> Coder:
        """Loaded with the first batch: of an error before that, Ray says only that a worker died."""
        return load_codec(self.codec, settle())


def _class_names(data: Data) -> tuple[str, ...]:
    if isinstance(data, ImageFolderData):
        return tuple(class_folders(data))
    return tuple(str(digit) for digit in range(10))
