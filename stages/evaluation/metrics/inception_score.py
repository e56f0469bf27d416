"""The `is` metric: the Inception Score, over splits of 5,000 samples in their order, as the ADM suite computes it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.inception_score import inception_scores, score_values
from graftwork.specs.metrics import InceptionScoreMetric
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.inception import Inception
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register


@register(InceptionScoreMetric)
class InceptionScoreJudge(Judge):
    """The network's own classes."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.inception = Inception.shared(inception, device)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(addends=score_values(self.inception.logits(images)))

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        """Return the mean of the splits' scores and, of several splits, their standard deviation."""
        assert row.splits is not None
        scores = inception_scores(row.splits)
        spread = {"is_sd": float(scores.std())} if len(scores) > 1 else {}
        return {"is": float(scores.mean()), **spread}
