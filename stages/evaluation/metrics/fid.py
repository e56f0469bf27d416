"""The `fid` and `sfid` metrics: the Frechet distance on features of pytorch-fid's Inception network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian, distance
from graftwork.specs.metrics import FidMetric, SfidMetric
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.inception import Inception, load_inception, reference_statistics
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register


@register(FidMetric)
class FidJudge(Judge):
    """The network's last features."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.inception = Inception.shared(inception, device)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(self.inception.pool3(images))

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        assert row.statistics is not None and reference.statistics is not None
        return {"fid": distance(row.statistics, reference.statistics)}

    @classmethod
    def read_reference(
        cls, context: Context, path: Path, background: str, inception: str | None, report: Callable[[int, int], None]
    ) -> Gaussian:
        network = partial(load_inception, inception, context.device)
        return reference_statistics(str(path), background, network, context.device, report)


@register(SfidMetric)
class SfidJudge(Judge):
    """Features of an earlier layer, with their places in the image."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.inception = Inception.shared(inception, device)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(self.inception.spatial(images))

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        assert row.statistics is not None and reference.statistics is not None
        return {"sfid": distance(row.statistics, reference.statistics)}

    @classmethod
    def read_reference(
        cls, context: Context, path: Path, background: str, inception: str | None, report: Callable[[int, int], None]
    ) -> Gaussian:
        network = partial(load_inception, inception, context.device)
        return reference_statistics(str(path), background, network, context.device, report, "sfid")
