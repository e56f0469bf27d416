"""The `fd_dino` metric: the Frechet distance on a DINO's class tokens (FD-DINOv2, arXiv 2306.04675, by ViT-L/14).

The figure carries the name of the DINO, since another one gives another number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian, distance
from graftwork.specs.figures import column_word
from graftwork.specs.hub import local_path
from graftwork.specs.metrics import FdDinoMetric
from graftwork.stages.artifacts.samples import as_picture
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.dino import Dino
from graftwork.stages.evaluation.inception import images_of, statistics_of
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register


@register(FdDinoMetric)
class FdDinoJudge(Judge):
    """A DINO."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.dino = _loaded(context, device)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(_features(self.dino, images), {f"fd_dino:{column_word(self.dino.name)}": len(images)})

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        assert row.statistics is not None and reference.statistics is not None
        (name,) = (name for name in row.shares if name.startswith("fd_dino:"))
        return {name: distance(row.statistics, reference.statistics)}

    @classmethod
    def read_reference(
        cls, context: Context, path: Path, background: str, inception: str | None, report: Callable[[int, int], None]
    ) -> Gaussian:
        dino = _loaded(context, context.device)
        return statistics_of(images_of(str(path), background), lambda batch: _features(dino, batch), report)


def _loaded(context: Context, device: torch.device) -> Dino:
    # Not by a hub id, for which transformers would fetch a newer revision than the one in the step's key.
    return Dino(str(local_path(context.params.dino.path)), device)


def _features(dino: Dino, images: NDArray[np.uint8]) -> Tensor:
    """Return the class tokens (n,D) float64 of images (n,C,H,W)."""
    return dino.class_tokens([as_picture(pixels) for pixels in images]).double()
