"""Frechet distance between two sets of features, as Gaussians (the distance of arXiv 1706.08500, via pytorch-fid)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d,d) of a set of features."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


def gaussian(features: NDArray[np.floating]) -> Gaussian:
    """Fit features (n,d)."""
    features = features.astype(np.float64)
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    return float(calculate_frechet_distance(first.mu, first.sigma, second.mu, second.sigma))
