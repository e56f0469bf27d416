"""`features`: images to latents, streamed through Ray Data; training and held-out, class by class in turn.

Leaves `{training,heldout}_latents.npy` (n,C,S,S) float32, `{training,heldout}_labels.npy` (n,) and `meta.json`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from specs.data import Data, ImageFolderData
from specs.steps import FeaturesParams
from stages import Context
from stages.latents import SPLITS, LatentsMeta, write_meta
from stages.sources import Item, class_folders, read_image, split

BATCH = 64


def run(context: Context) -> None:
    params: FeaturesParams = context.params
    splits = dict(zip(SPLITS, split(params.data), strict=True))
    total, done = sum(map(len, splits.values())), 0
    shape = read_image(params.data, splits["training"][0].name).shape
    context.report(0, total)
    for name, items in splits.items():
        np.save(context.out / f"{name}_labels.npy", np.array([item.label for item in items], dtype=np.int64))
        path = context.out / f"{name}_latents.npy"
        latents = np.lib.format.open_memmap(path, "w+", np.float32, (len(items), *shape))
        for batch in _encoded(params.data, items, context):
            latents[batch["index"]] = batch["latent"]
            done += len(batch["index"])
            context.report(done, total)
        latents.flush()
    meta = LatentsMeta(
        codec=params.codec.kind,
        channels=shape[0],
        side=shape[1],
        classes=_class_names(params.data),
        num_training=len(splits["training"]),
        num_heldout=len(splits["heldout"]),
    )
    write_meta(context.out, meta)


def _encoded(data: Data, items: list[Item], context: Context) -> Any:
    """Batches of `index` and `latent`, in whatever order they are ready."""

    def encode(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"index": batch["index"], "latent": np.stack([read_image(data, name) for name in batch["name"]])}

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"index": index, "name": item.name} for index, item in enumerate(items)]
    dataset = ray.data.from_items(rows).map_batches(
        encode, batch_size=BATCH, num_cpus=context.resources.cpu, num_gpus=context.resources.gpu or None
    )
    return dataset.iter_batches(batch_size=BATCH, batch_format="numpy")


def _class_names(data: Data) -> tuple[str, ...]:
    if isinstance(data, ImageFolderData):
        return tuple(class_folders(data))
    return tuple(str(digit) for digit in range(10))
