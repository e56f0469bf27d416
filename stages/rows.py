"""Samples of one row of the table: fixed batches, each a Ray task with its own noise, each kept as it is done.

Leaves `samples.npy` (n,C,S,S) uint8, decoded by the codec; `labels.npy` (n,) and `grid.png`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.runtime import fan_out
from models.dit import DiT
from models.precision import computing
from models.sampling import sample
from models.streams import SampleNoise
from specs.evaluate import Sampler
from specs.steps import SampleParams
from stages import Context
from stages.codec import Coder, load_codec
from stages.hybrid import row_model
from stages.latents import LatentsMeta, read_meta


def sample_row(context: Context) -> None:
    from stages.pictures import sample_grid  # matplotlib, which the workers do not need

    params: SampleParams = context.params
    starts = range(0, params.samples, params.batch)
    missing = [start for start in starts if context.partial.load(_file(start)) is None]
    done = len(starts) - len(missing)
    context.report(min(done * params.batch, params.samples), params.samples)
    for start, images in fan_out(_sample_batch, context, missing, context.resources):
        context.partial.save(_file(start), partial(_save, images))
        done += 1
        context.report(min(done * params.batch, params.samples), params.samples)
        context.stop_if_asked()
    batches = [context.partial.load(_file(start)) for start in starts]
    if None in batches:
        raise RuntimeError("a batch of samples was damaged after it was drawn; resume to draw it again")
    images = np.concatenate([np.load(path) for path in batches if path is not None])
    meta = read_meta(context.input("features"))
    labels = labels_of(range(params.samples), meta)
    np.save(context.out / "samples.npy", images)
    np.save(context.out / "labels.npy", labels.numpy())
    sample_grid(images, [meta.classes[label] for label in labels], params.row, context.out / "grid")


def labels_of(indices: Iterable[int], meta: LatentsMeta) -> Tensor:
    """Labels take turns: sample i is of class i modulo their number."""
    return torch.tensor([index % len(meta.classes) for index in indices])


def draw(model: DiT, meta: LatentsMeta, indices: range, sampler: Sampler, seed: int, device: torch.device) -> Tensor:
    """Latents of the samples with these indices: the same for any batch that they come in, up to rounding."""
    labels = labels_of(indices, meta).to(device)
    noise = SampleNoise(seed, indices, (meta.channels, meta.side, meta.side), device)
    return sample(model, labels, noise, sampler=sampler, null_class=len(meta.classes), bounded=meta.bounded)


def _sample_batch(context: Context, start: int, device: torch.device) -> tuple[int, NDArray[np.uint8]]:
    params: SampleParams = context.params
    model, codec = _loaded(context, device)
    indices = range(start, min(start + params.batch, params.samples))
    meta = read_meta(context.input("features"))
    with computing(params.precision, device):
        latents = draw(model, meta, indices, params.sampler, params.seed, device)
    return start, codec.decode(latents)


_LAST: dict[tuple[str, ...], tuple[DiT, Coder]] = {}


def _loaded(context: Context, device: torch.device) -> tuple[DiT, Coder]:
    """The row's model and the codec; a process that draws several of its batches loads them once."""
    params: SampleParams = context.params
    # The key of the features stands for the VAE's content.
    identity = (params.row, *(context.inputs[role].key for role in sorted(context.inputs)))
    if identity not in _LAST:
        _LAST.clear()
        model = row_model(context, params.row, params.seed).to(device)
        _LAST[identity] = model, load_codec(params.codec, device)
    return _LAST[identity]


def _save(images: NDArray[np.uint8], path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix to its name
        np.save(file, images)


def _file(start: int) -> str:
    return f"samples-{start:07d}.npy"
