"""The `precision_recall` and `kid` metrics, which need Inception's last features (pool3) of every image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.measures.kid import SUBSET_IMAGES, subset_distances
from graftwork.models.measures.precision_recall import precision_recall_hits
from graftwork.specs.metrics import KidMetric, PrecisionRecallMetric
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.bootstrap import BOOTSTRAP_SEED, NUM_BOOTSTRAP_DRAWS, interval
from graftwork.stages.evaluation.inception import Inception
from graftwork.stages.evaluation.metrics import Judge, Seen, Summary, register

CPU = torch.device("cpu")  # the figures of a table are computed on


class _Pool3Judge(Judge):
    """A judge that keeps pool3 of every image."""

    def __init__(self, context: Context, inception: str | None, device: torch.device) -> None:
        self.inception = Inception.shared(inception, device)

    def look(self, images: NDArray[np.uint8], labels: Tensor) -> Seen:
        return Seen(rows=self.inception.pool3(images).float())


@register(PrecisionRecallMetric)
class PrecisionRecallJudge(_Pool3Judge):
    """The nearest neighbours of each image."""

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        """Return both shares, each with the bounds of its 95% interval; nothing for a row of too few images."""
        assert row.rows is not None and reference.rows is not None
        if len(row.rows) < PrecisionRecallMetric.min_images:  # real images alone can be so few
            return {}
        precise, recalled = precision_recall_hits(row.rows, reference.rows, CPU)
        return share_figures("precision", precise) | share_figures("recall", recalled)


@register(KidMetric)
class KidJudge(_Pool3Judge):
    """The kernel between images."""

    @staticmethod
    def figures(row: Summary, reference: Summary) -> dict[str, float]:
        """Return the mean over subsets and their standard deviation; without that, where all subsets are the same."""
        assert row.rows is not None and reference.rows is not None
        distances = subset_distances(row.rows, reference.rows, CPU)
        differ = max(len(row.rows), len(reference.rows)) > min(len(row.rows), len(reference.rows), SUBSET_IMAGES)
        spread = {"kid_sd": float(distances.std())} if differ else {}
        return {"kid": float(distances.mean()), **spread}


def share_figures(name: str, hits: NDArray[np.bool_]) -> dict[str, float]:
    """Return the share of images that are hits, with the bounds of its 95% interval, by a bootstrap over the images.

    The number of hits in a draw of as many images with replacement is binomial. The neighbourhoods are taken as given.
    """
    share = float(hits.mean())
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    low, high = interval(generator.binomial(len(hits), share, NUM_BOOTSTRAP_DRAWS) / len(hits))
    return {name: share, f"{name}_low": low, f"{name}_high": high}
