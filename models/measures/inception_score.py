"""The Inception Score (arXiv 1606.03498), over splits of images in the order in which they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPLIT_IMAGES = 5000  # as in the ADM suite's evaluator; the last split has what is left


@dataclass(frozen=True)
class SplitSums:
    """Sums of values of images over each split of consecutive ones: the values themselves are gone."""

    count: int = 0  # images in all
    sums: tuple[Tensor, ...] = ()  # (d,) float64, a split each

    def plus(self, values: Tensor) -> SplitSums:
        """Return the sums with the values (n,d) of the images that come next."""
        count, sums = self.count, list(self.sums)
        while len(values):
            place = count % SPLIT_IMAGES
            part, values = values[: SPLIT_IMAGES - place], values[SPLIT_IMAGES - place :]
            if place == 0:
                sums.append(part.sum(0))
            else:
                sums[-1] = sums[-1] + part.sum(0)
            count += len(part)
        return SplitSums(count, tuple(sums))

    def sizes(self) -> list[int]:
        """Return the number of images in each split."""
        return [min(SPLIT_IMAGES, self.count - start) for start in range(0, self.count, SPLIT_IMAGES)]


def score_values(logits: Tensor) -> Tensor:
    """Return the values (n,c+1) whose sums the score is made of: the classes' probabilities p, and sum(p log p).

    logits: (n,c).
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return torch.cat([p, (p * log_p).sum(1, keepdim=True)], 1)


def inception_scores(splits: SplitSums) -> NDArray[np.float64]:
    """Return the score of each split (s,): exp of the mean over images of KL(p(y|x) || p(y))."""
    scores = []
    for size, sums in zip(splits.sizes(), splits.sums, strict=True):
        mean = sums / size
        marginal = mean[:-1]
        scores.append((mean[-1] - torch.xlogy(marginal, marginal).sum()).exp().item())
    return np.array(scores)
