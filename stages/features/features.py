"""`features`: images to latents, streamed through Ray Data; training and held-out, class by class in turn.

Which images are encoded is settled before any is read. They are encoded in shards: a shard that is whole is kept, and
not encoded again after a kill or a stop. Leaves the shards, of training images also those of the mirror images where
the spec asks for them (layout: `stages.artifacts.latents`), `{training,heldout}_labels.npy` (n,), `meta.json`, and
`broken.json`, the images that were left out, where the spec allows that; and `images.sha256`, what each image holds,
which is what the step's key was made of: an image that holds something else when it is read is an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

from graftwork.cluster.session.runtime import options, room_for, settle
from graftwork.specs.codec import PixelCodec, VaeCodec
from graftwork.specs.data import TEXT_DATA, Data, ImageFiles, SyntheticData
from graftwork.specs.problems import plain, text
from graftwork.specs.resources import StepResources
from graftwork.stages.artifacts.latents import NUMBERS, SPLITS, LatentsMeta, ShardWriter, write_meta
from graftwork.stages.catalog.features import FeaturesParams
from graftwork.stages.contract import Context
from graftwork.stages.data.hashes import IMAGES, ChangedImage, ImageHashes, require_content, write_hashes
from graftwork.stages.data.images import BrokenImage, broken_images, broken_line, read_pixels, scaled
from graftwork.stages.data.listing import listing_once
from graftwork.stages.data.sources import MIN_HELDOUT, Item, class_names, identity, items, split
from graftwork.stages.data.tars import Span
from graftwork.stages.features.codec import (
    BATCH,
    GPU_BYTES,
    Coder,
    UnfitCodec,
    batch_size_for,
    load_codec,
    require_fit,
    vae_config,
)

SHARD = 2048  # images
BATCHES_A_TASK = 4
WORTH_A_STREAM = 4096  # images whose latents are pixels: up to so many are read before Ray Data has begun
WORTH_A_SURVEY = 256  # images: fewer are looked at for broken ones before Ray Data has begun
BROKEN = "broken.json"
ACCEPTED = "accepted: images that can be read, or data.skip_broken: true, which leaves the others out and counts them"
Row = dict[str, Any]  # of Ray's data set: a piece of a shard, `shard`, `start`, `names`; later `images`; then `latents`


@dataclass(frozen=True)
class Shard:
    """Images that follow each other in a split; each of its views is a file."""

    split: str
    number: int
    items: Sequence[Item]
    views: tuple[str, ...]  # latents, and perhaps mirrored

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(f"{self.split}_{view}-{self.number:05d}.npy" for view in self.views)


def run(context: Context) -> None:
    params: FeaturesParams = context.params
    data, codec = params.data, params.codec
    require_fit(codec, data)
    with listing_once():
        splits, broken = _chosen(data)
        _require_every_class(data, splits)
        classes = class_names(data)
        if context.images is not None:
            _require_same(context.images, data, splits)
    if not isinstance(data, SyntheticData):
        encode(context, shards(splits, data.flip))
    for name, members in splits.items():
        if isinstance(data, SyntheticData):
            np.save(context.out / f"{name}_{NUMBERS}", np.array([int(item.name) for item in members], dtype=np.int64))
        np.save(context.out / f"{name}_labels.npy", np.array([item.label for item in members], dtype=np.int64))
    own = vae_config(codec) if isinstance(codec, VaeCodec) else None
    meta = LatentsMeta(
        codec=codec.kind,
        scale=own.scaling_factor if own else 1.0,
        shift=own and own.shift_factor,
        means=own and own.latents_mean,
        deviations=own and own.latents_std,
        shape=(codec.latent_channels(data), data.image_size // codec.factor, data.image_size // codec.factor),
        classes=classes,
        num_training=len(splits["training"]),
        num_heldout=len(splits["heldout"]),
    )
    write_meta(context.out, meta)
    if context.images is not None:
        chosen = [item.name for members in splits.values() for item in members]
        write_hashes(context.out / IMAGES, {name: context.images.by_name[name] for name in chosen})
    if data.skip_broken:
        read = sum(map(len, splits.values())) + len(broken)
        listed = {"count": len(broken), "of": read, "broken": sorted(map(text, broken))}
        (context.out / BROKEN).write_text(json.dumps(listed, indent=1))
        if broken:
            context.note(f"left out {len(broken)} of {read} images, see {BROKEN} in it")


def _chosen(data: Data) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """The images to encode, split by split; and of those that are left out as broken, by name, what is wrong.

    Where an image is left out, the next of its class takes its place, and is read, too.
    """
    broken: dict[str, str] = {}
    sound: set[str] = set()
    while True:
        splits = dict(zip(SPLITS, split(data, without=broken), strict=True))
        members = [item for members in splits.values() for item in members if item.name not in sound]
        if not data.skip_broken or not members:
            return splits, broken
        broken |= _survey(data, members)
        sound.update(item.name for item in members)


def _require_same(images: ImageHashes, data: Data, splits: Mapping[str, Sequence[Item]]) -> None:
    """Raise ChangedImage if there are other images now than when the job's keys were made."""
    listed = items(data) if data.skip_broken else [item for members in splits.values() for item in members]
    assert isinstance(data, ImageFiles)
    images.require_same(identity(data), [item.name for item in listed])


def _survey(data: Data, members: Sequence[Item]) -> dict[str, str]:
    """Read all images, many of them on every CPU, and return by name the problem of each that cannot be read."""
    if len(members) < WORTH_A_SURVEY:
        return broken_images(data, _places(_sent(members)))

    def survey(row: Row) -> Row:
        problems = broken_images(data, _places(row))
        return {"names": [os.fsencode(name) for name in problems], "problems": list(problems.values())}

    count = BATCHES_A_TASK * BATCH
    rows = [_sent(members[start : start + count]) for start in range(0, len(members), count)]
    surveys = _rows(rows).map(survey, num_cpus=1).iter_rows()
    pairs = (zip(row["names"], row["problems"], strict=True) for row in surveys)
    return {os.fsdecode(name): problem for problems in pairs for name, problem in problems}


def _require_every_class(data: Data, splits: Mapping[str, Sequence[Item]]) -> None:
    """Where images were left out: that each class still has some, and as many to train on as the spec wants."""
    training, heldout = (Counter(item.label for item in splits[name]) for name in SPLITS)
    for label, name in enumerate(() if isinstance(data, TEXT_DATA) else class_names(data)):
        if not training[label] + heldout[label]:
            raise ValueError(
                f"data.path: no image of the class {plain(name)} can be read; accepted: classes with images"
            )
        if data.per_class is not None and training[label] < data.per_class:
            accepted = f"at most {training[label]}, the training images of the class {plain(name)} that can be read"
            raise ValueError(f"data.per_class: got {data.per_class}; accepted: {accepted}")
    if data.skip_broken and heldout.total() < MIN_HELDOUT:
        found = f"which holds out {heldout.total()} of the {training.total() + heldout.total()} images that can be read"
        raise ValueError(f"data.heldout: got {data.heldout}, {found}; accepted: data of which at least 2 are held out")


def shards(splits: Mapping[str, Sequence[Item]], flip: bool) -> list[Shard]:
    """Each split in runs of SHARD images; at least one, so that an empty split has a file as well."""
    return [
        Shard(
            name, number, members[start : start + SHARD], ("latents", "mirrored")[: 1 + (flip and name == "training")]
        )
        for name, members in splits.items()
        for number, start in enumerate(range(0, max(1, len(members)), SHARD))
    ]


def encode(context: Context, wanted: Sequence[Shard]) -> None:
    """Have each shard's files in the step's folder: as they were kept, or encoded now and kept when they are whole."""
    params: FeaturesParams = context.params
    side = params.data.image_size // params.codec.factor
    shape = (params.codec.latent_channels(params.data), side, side)
    missing = [shard for shard in wanted if not _take(shard, context)]
    drafts = [Draft(shard, context.out, shape) for shard in missing]
    total, left = (sum(len(shard.items) for shard in some) for some in (wanted, missing))
    context.report(total - left, total)
    for draft in drafts:
        if not draft.left:  # an empty split
            draft.keep(context)
    try:
        for row in _as_raised(_encoded(params, missing, context.resources, context.images)):
            draft = drafts[row["shard"]]
            draft.write(row["start"], row["latents"])
            left -= row["latents"].shape[1]
            if not draft.left:
                draft.keep(context)
            context.report(total - left, total)
            context.stop_if_asked()
    except BrokenImage:
        members = [item for shard in wanted for item in shard.items]
        problems = _survey(params.data, members).values()
        raise ValueError(f"data.path: {broken_line(problems, total)}; {ACCEPTED}") from None


class Draft:
    """A shard that is being filled."""

    def __init__(self, shard: Shard, folder: Path, shape: tuple[int, ...]) -> None:
        self.shard, self.left = shard, len(shard.items)
        self.writers = [ShardWriter(folder / file, (len(shard.items), *shape)) for file in shard.files]

    def write(self, start: int, latents: NDArray[np.float32]) -> None:
        """Latents (views,n,C,S,S) of the items from `start` on."""
        for writer, part in zip(self.writers, latents, strict=True):
            writer.write(start, part)
        self.left -= latents.shape[1]

    def keep(self, context: Context) -> None:
        """Publish it; its files stay in the step's folder, too, on the same bytes of the disk where they can."""
        for file in self.shard.files:
            context.partial.save(file, partial(link, context.out / file))


def _take(shard: Shard, context: Context) -> bool:
    """Have a shard that was kept in the step's folder; False where it has to be encoded."""
    kept = [path for file in shard.files if (path := context.partial.load(file)) is not None]
    if len(kept) < len(shard.files):
        return False
    for file, path in zip(shard.files, kept, strict=True):
        link(path, context.out / file)
    return True


def link(path: Path, to: Path) -> None:
    """A second name for a file that nobody changes any more; a copy where the file system has no such thing."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def _encoded(
    params: FeaturesParams, missing: Sequence[Shard], resources: StepResources, hashes: ImageHashes | None
) -> Iterator[Row]:
    """The pieces of the shards, encoded, in whatever order they are ready.

    Which images pass through the VAE together is settled here, and not by how Ray cuts the data for the workers that
    it happens to have: so not even the last bits depend on those.
    """

    def read(row: Row) -> Row:  # in here, so that a worker that only reads need not load torch with this module
        places = _places(row)
        images = np.stack([read_pixels(data, name, span) for name, span in places])
        if isinstance(data, ImageFiles) and "digests" in row:
            for (name, span), digest in zip(places, row["digests"], strict=True):
                require_content(Path(data.path), name, digest, span)
        return {**row, "images": images}

    def as_latents(row: Row) -> Row:
        images = scaled(row["images"])
        views = [images, images[..., ::-1]][: row["views"]]
        return {"shard": row["shard"], "start": row["start"], "latents": np.stack(views)}

    data, codec = params.data, params.codec
    room = GPU_BYTES if resources.gpu else None
    batch = batch_size_for(codec, data.image_size, room) if isinstance(codec, VaeCodec) else BATCH
    pieces = _pieces(missing, BATCHES_A_TASK * batch, hashes)
    told_ray = {name: value for name, value in options(resources).items() if value}
    if not pieces:
        return iter(())
    if isinstance(codec, PixelCodec) and sum(len(piece["names"]) for piece in pieces) <= WORTH_A_STREAM:
        return (as_latents(read(piece)) for piece in pieces)
    if isinstance(codec, PixelCodec):
        return iter(_rows(pieces).map(lambda row: as_latents(read(row)), **told_ray).iter_rows())
    # Without a GPU Ray fuses the two, so that a worker reads what it encodes and one CPU is enough.
    images = _rows(pieces).map(read, num_cpus=1 if resources.gpu else resources.cpu)
    at_once = min(len(pieces), max(1, room_for(resources)))
    workers = ray.data.ActorPoolStrategy(min_size=1, initial_size=at_once, max_size=len(pieces))
    return iter(
        images.map(Encoder, fn_constructor_args=(codec, resources.gpu), compute=workers, **told_ray).iter_rows()
    )


def _pieces(missing: Sequence[Shard], count: int, hashes: ImageHashes | None) -> list[Row]:
    """Rows of at most `count` images, none of more than one shard."""
    return [
        _piece(number, shard, start, shard.items[start : start + count], hashes)
        for number, shard in enumerate(missing)
        for start in range(0, len(shard.items), count)
    ]


def _piece(number: int, shard: Shard, start: int, part: Sequence[Item], hashes: ImageHashes | None) -> Row:
    digests = {"digests": [hashes.by_name[item.name].hex() for item in part]} if hashes is not None else {}
    return {"shard": number, "start": start, "views": len(shard.views), **_sent(part), **digests}


def _sent(members: Sequence[Item]) -> Row:
    """Return images as they go to workers: their names, which need not be text, and their places in tars, if any."""
    spans = [item.span.encode() for item in members if item.span is not None]
    return {"names": [os.fsencode(item.name) for item in members]} | ({"spans": spans} if spans else {})


def _places(row: Row) -> list[tuple[str, Span | None]]:
    """Return the names of a row's images, each with its place in a tar, if there are tars."""
    names = list(map(os.fsdecode, row["names"]))
    return list(zip(names, map(Span.decode, row["spans"]) if "spans" in row else [None] * len(names), strict=True))


def _rows(rows: list[Row]) -> ray.data.Dataset:
    """A data set in which each row is a task."""
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.raise_original_map_exception = False, True
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _as_raised(rows: Iterator[Row]) -> Iterator[Row]:
    """What a worker says of an image or of the VAE, without the advice on retries that Ray puts below it."""
    try:
        yield from rows
    except ray.exceptions.RayTaskError as error:
        if type(error.cause) in (BrokenImage, ChangedImage, UnfitCodec):
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise


class Encoder:
    """A worker that holds the VAE, and a share of a GPU."""

    def __init__(self, codec: VaeCodec, gpu: float) -> None:
        self.codec, self.gpu = codec, gpu

    def __call__(self, row: Row) -> Row:
        settle()
        images, names = torch.from_numpy(np.array(row["images"])), [text(os.fsdecode(name)) for name in row["names"]]
        views = [self._vae.encode(images, names)]
        if row["views"] > 1:  # no image's name ends so: it would be a folder's
            views.append(self._vae.encode(images.flip(-1), [f"{name}/mirrored" for name in names]))
        return {"shard": row["shard"], "start": row["start"], "latents": torch.stack(views).cpu().numpy()}

    @cached_property
    def _vae(self) -> Coder:
        """Loaded with the first images: of an error before that, Ray says only that a worker died."""
        return load_codec(self.codec, settle(), min(self.gpu, 1.0))
