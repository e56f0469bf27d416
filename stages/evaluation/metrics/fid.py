"""The `fid` metric: the Frechet distance on the features of pytorch-fid's Inception network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.frechet import Gaussian, distance
from graftwork.specs.metrics import FidMetric
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.inception import inception_features, load_inception, reference_statistics
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register


@register(FidMetric)
class FidJudge(Judge):
    """pytorch-fid's Inception network."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.network, self.device = load_inception(inception, device), device

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(inception_features(images, self.network, self.device))

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
