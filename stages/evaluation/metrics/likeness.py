"""The `likeness` metric: how near samples are to the rootstock's of the same noise and the same class or text.

Each row keeps its first samples, and the vectors that networks see them as: no row is drawn again when another changes,
and the table needs no network. The figures of the networks carry their names, as `likeness:dino:dinov2-base`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.specs.figures import column_word
from graftwork.specs.hub import local_path
from graftwork.specs.metrics import LikenessMetric
from graftwork.stages.artifacts.samples import SAMPLES, as_picture
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.bootstrap import mean_with_interval
from graftwork.stages.evaluation.clip import Clip
from graftwork.stages.evaluation.dino import Dino
from graftwork.stages.evaluation.metrics import SCORES, Judge, Seen, Summary, register

MAX_LEVEL = 255
NETWORKS: dict[str, type[Dino | Clip]] = {"dino": Dino, "clip": Clip}


@register(LikenessMetric)
class LikenessJudge(Judge):
    """Keeps images and their vectors, to be held against those of the rootstock."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        params = context.params
        self.max_samples = params.likeness.samples
        self.keeps_images = not params.keep_samples  # which leaves them all
        self.subject = "prompts" if "text" in context.inputs else "classes"
        # Not by a hub id, for which transformers would fetch a newer revision than the one in the step's key.
        named = params.likeness.networks().items()
        self.networks = {kind: NETWORKS[kind](str(local_path(spec.path)), device) for kind, spec in named}

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        arrays: dict[str, NDArray[Any]] = {self.subject: labels.numpy()}
        if self.keeps_images:
            arrays["images"] = images
        pictures = [as_picture(pixels) for pixels in images] if self.networks else []
        for kind, network in self.networks.items():
            arrays[kind] = network.image_vectors(pictures).cpu().numpy()
        names = (f"likeness:{kind}:{column_word(network.name)}" for kind, network in self.networks.items())
        return Seen(counts=dict.fromkeys(names, len(images)), arrays=arrays)

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        """Return none: a row alone is like nothing."""
        return {}

    @staticmethod
    def beside(row: Path, rootstock: Path) -> dict[str, float]:
        """Return the means over samples, each with the bounds of its 95% interval; over prompts if there are some."""
        prompts = _file(row, "prompts")
        subjects = np.load(prompts if prompts.exists() else _file(row, "classes"))
        groups = subjects if prompts.exists() else np.arange(len(subjects))
        by_figure = {"psnr": psnr(*(_images(folder, len(subjects)) for folder in (row, rootstock)))}
        for name in _network_names(row):
            kind = name.partition(":")[0]
            by_figure[name] = cosines(*(np.load(_file(folder, kind)) for folder in (row, rootstock)))
        columns: dict[str, float] = {}
        for name, values in by_figure.items():
            bounds = zip(("likeness", "likeness_low", "likeness_high"), mean_with_interval(values, groups), strict=True)
            columns |= {f"{prefix}:{name}": value for prefix, value in bounds}
        return columns


def psnr(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each pair of images (n,C,H,W), in dB: 10 log10(255^2 / MSE).

    Two equal images, whose ratio is infinite, count as if one value of one channel were one level off: the least
    difference that two images can have, of 20 log10(255) + 10 log10(CHW) dB.
    """
    ratios = np.empty(len(images))
    for number, (image, other) in enumerate(zip(images, others, strict=True)):
        squares = np.square(image.astype(np.int32) - other).sum(dtype=np.int64)
        ratios[number] = 10 * np.log10(MAX_LEVEL**2 * image.size / max(squares, 1))
    return ratios


def cosines(vectors: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each pair of vectors (n,D)."""
    first, second = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors * 1.0, others * 1.0))
    return (first * second).sum(1)


def _file(folder: Path, name: str) -> Path:
    """Return where a row has an array."""
    return folder / f"{LikenessMetric.name}.{name}.npy"


def _images(folder: Path, count: int) -> NDArray[np.uint8]:
    """Return the first images of a row."""
    images = _file(folder, "images")
    all_images: NDArray[np.uint8] = np.load(images if images.exists() else folder / SAMPLES, mmap_mode="r")
    return all_images[:count]


def _network_names(folder: Path) -> list[str]:
    """Return `dino:NAME` and `clip:NAME` of the networks that looked at a row."""
    prefix = f"{LikenessMetric.name}:"
    return [name.removeprefix(prefix) for name in json.loads((folder / SCORES).read_text()) if name.startswith(prefix)]
