"""`features`: images to latents, streamed through Ray Data; training and held-out, class by class in turn.

Leaves `{training,heldout}_latents.npy` (n,C,S,S) float32, `{training,heldout}_labels.npy` (n,) and `meta.json`; and
`broken.json`, the images that were left out, where the spec allows that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import ray.data
import torch

from cluster.runtime import options, settle
from specs.data import Data, ImageFolderData, PixelCodec, VaeCodec
from specs.job import StepResources
from specs.problems import plain
from specs.steps import FeaturesParams
from stages import Context
from stages.codec import BATCH, Coder, UnfitCodec, load_codec, require_fit
from stages.latents import SPLITS, LatentsMeta, write_meta
from stages.sources import BrokenImage, Item, broken_images, class_folders, items, read_image, split, text, told

BATCHES_A_TASK = 8
BROKEN = "broken.json"
ACCEPTED = "accepted: images that can be read, or data.skip_broken: true, which leaves the others out and counts them"
Batch = dict[str, Any]  # a row of Ray's data set: `split`, `start`, `names`, and `images`, encoded in the end


def run(context: Context) -> None:
    params: FeaturesParams = context.params
    data, codec = params.data, params.codec
    require_fit(codec, data)
    broken = _survey(data) if getattr(data, "skip_broken", False) else {}
    splits = dict(zip(SPLITS, split(data, without=broken), strict=True))
    _require_every_class(data, splits)
    channels, side = codec.latent_channels(data), data.image_size // codec.factor
    latents = {}
    for name, members in splits.items():
        np.save(context.out / f"{name}_labels.npy", np.array([item.label for item in members], dtype=np.int64))
        path, shape = context.out / f"{name}_latents.npy", (len(members), channels, side, side)
        latents[name] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    total, done = sum(map(len, splits.values())), 0
    context.report(0, total)
    try:
        for batch in _as_raised(_encoded(params, splits, context.resources)):
            start, count = batch["start"], len(batch["images"])
            latents[batch["split"]][start : start + count] = batch["images"]
            done += count
            context.report(done, total)
            context.stop_if_asked()
    except BrokenImage:
        raise ValueError(f"data.path: {told(_survey(data).values(), total)}; {ACCEPTED}") from None
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
    if getattr(data, "skip_broken", False):
        listed = {"count": len(broken), "of": total + len(broken), "broken": sorted(map(text, broken))}
        (context.out / BROKEN).write_text(json.dumps(listed, indent=1))


def _survey(data: Data) -> dict[str, str]:
    """The images that cannot be read, by name, with what is said of each: every image is read, on every CPU."""

    def survey(batch: Batch) -> Batch:
        found = broken_images(data, map(os.fsdecode, batch["names"]))
        return {"names": [os.fsencode(name) for name in found], "problems": list(found.values())}

    names = [item.name for item in items(data)]
    found = _rows({"": names}).map(survey, num_cpus=1).iter_rows()
    return {os.fsdecode(name): said for row in found for name, said in zip(row["names"], row["problems"], strict=True)}


def _require_every_class(data: Data, splits: dict[str, list[Item]]) -> None:
    """Where images were left out: that each class still has some."""
    there = {item.label for members in splits.values() for item in members}
    for label, name in enumerate(_class_names(data)):
        if label not in there:
            raise ValueError(
                f"data.path: no image of the class {plain(name)} can be read; accepted: classes with images"
            )


def _encoded(params: FeaturesParams, splits: dict[str, list[Item]], resources: StepResources) -> Iterator[Batch]:
    """The batches, encoded, in whatever order they are ready.

    Which images pass through the VAE together is settled here, and not by how Ray cuts the data for the workers that
    it happens to have: so not even the last bits depend on those.
    """

    def read(batch: Batch) -> Batch:  # in here, so that a worker that only reads need not load torch with this module
        return {**batch, "images": np.stack([read_image(data, os.fsdecode(name)) for name in batch["names"]])}

    data, encode = params.data, {name: value for name, value in options(resources).items() if value}
    rows = _rows({name: [item.name for item in members] for name, members in splits.items()})
    if isinstance(params.codec, PixelCodec):
        return iter(rows.map(read, **encode).iter_rows())
    # Without a GPU Ray fuses the two, so that a worker reads what it encodes and one CPU is enough.
    images = rows.map(read, num_cpus=1 if resources.gpu else resources.cpu)
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=rows.num_blocks())
    return iter(images.map(Encoder, fn_constructor_args=(params.codec,), compute=workers, **encode).iter_rows())


def _rows(names: dict[str, list[str]]) -> ray.data.Dataset:
    """Batches of images by name, split by split; names go as bytes, since they need not be text."""
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.raise_original_map_exception = False, True
    batches = [
        {"split": split, "start": start, "names": [os.fsencode(name) for name in members[start : start + BATCH]]}
        for split, members in names.items()
        for start in range(0, len(members), BATCH)
    ]
    return ray.data.from_items(batches, override_num_blocks=math.ceil(len(batches) / BATCHES_A_TASK))


def _as_raised(batches: Iterator[Batch]) -> Iterator[Batch]:
    """What a worker says of an image or of the VAE, without the advice on retries that Ray puts below it."""
    try:
        yield from batches
    except ray.exceptions.RayTaskError as error:
        if type(error.cause) in (BrokenImage, UnfitCodec):
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise


class Encoder:
    """A worker that holds the VAE."""

    def __init__(self, codec: VaeCodec) -> None:
        self.codec = codec

    def __call__(self, batch: Batch) -> Batch:
        settle()
        names = [text(os.fsdecode(name)) for name in batch["names"]]
        latents = self._vae.encode(torch.from_numpy(np.array(batch["images"])), names)
        return {**batch, "images": latents.cpu().numpy()}

    @cached_property
    def _vae(self) -> Coder:
        """Loaded with the first batch: of an error before that, Ray says only that a worker died."""
        return load_codec(self.codec, settle())


def _class_names(data: Data) -> tuple[str, ...]:
    if isinstance(data, ImageFolderData):
        return tuple(map(text, class_folders(data)))
    return tuple(str(digit) for digit in range(10))
