"""The Kernel Inception distance (arXiv 1801.01401): an unbiased squared maximum mean discrepancy, over subsets."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.specs.metrics import KID_SUBSET_IMAGES

NUM_SUBSETS, SUBSET_IMAGES, SUBSET_SEED = 100, KID_SUBSET_IMAGES, 0


def subset_distances(
    samples: NDArray[np.float32], reference: NDArray[np.float32], device: torch.device
) -> NDArray[np.float64]:
    """Return the distance between a subset of each, (NUM_SUBSETS,); their mean is the KID.

    A subset is drawn without replacement and has SUBSET_IMAGES images, or all of the smaller set if that has fewer.
    samples: features (n,d), reference: (m,d), n and m at least 2.
    """
    size = min(SUBSET_IMAGES, len(samples), len(reference))
    generator = np.random.default_rng(SUBSET_SEED)
    distances = []
    for _ in range(NUM_SUBSETS):
        subsets = []
        for features in (samples, reference):
            chosen = np.sort(generator.choice(len(features), size, replace=False))  # in the order of the file
            subsets.append(torch.from_numpy(features[chosen]).to(device).double())
        distances.append(unbiased_mmd(*subsets))
    return np.array(distances)


def unbiased_mmd(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate of the squared MMD of two sets (n,d) of one size (arXiv 1801.01401, eq. 4)."""
    count = len(first)
    within = sum(_without_diagonal(kernel(part, part)) for part in (first, second))
    return float(within / (count * (count - 1)) - 2 * kernel(first, second).mean())


def kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return (x.y / d + 1)^3 of each pair (n,m) of features (n,d) and (m,d)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def _without_diagonal(matrix: Tensor) -> Tensor:
    return matrix.sum() - matrix.diagonal().sum()
