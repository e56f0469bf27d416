"""Frechet distance between two sets of features, as Gaussians (the distance of arXiv 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPS = 1e-6  # added to both covariances' diagonals where their product has no finite root
MAX_IMAGINARY = 1e-3  # on the root's diagonal: rounding gives it some


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d,d) of a set of features."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    def write(self, path: Path) -> None:
        """As an .npz with mu and sigma, the form in which reference statistics are published."""
        np.savez(path, mu=self.mu, sigma=self.sigma)

    @classmethod
    def read(cls, path: Path) -> Gaussian:
        """What `write` left; files of other people are for `stages.evaluation.inception.read_statistics`."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["mu"], file["sigma"])


@dataclass(frozen=True)
class Moments:
    """What is kept of a set of features, so that another set can be added: float64, the features themselves are gone.

    The scatter is taken about the set's own mean, which moves as sets are added (Chan, Golub & LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979): a sum of squares would lose the variance
    of features that lie far from 0. Added in the same order, the same sets give the same bits.
    """

    count: int
    mean: Tensor  # (d,)
    scatter: Tensor  # (d,d), the sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (n,d), n at least 1; they stay on their device."""
        features = features.double()
        mean = features.mean(0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = torch.outer(apart, apart * (self.count * other.count / count))
        return Moments(count, mean, between.add_(self.scatter).add_(other.scatter))

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance; of one feature alone it is no number."""
        divisor = self.count - 1 if self.count > 1 else float("nan")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / divisor).cpu().numpy())


def distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance, |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500, eq. 6).

    In pytorch-fid's own steps, so that the figure is the same: its function calls SciPy in a way that ended with 1.18.
    Raises ValueError where the root is not real, beyond rounding.
    """
    from scipy import linalg

    apart = first.mu - second.mu
    root = linalg.sqrtm(first.sigma.dot(second.sigma))
    if not np.isfinite(root).all():  # the product is almost singular
        offset = np.eye(len(first.sigma)) * EPS
        root = linalg.sqrtm((first.sigma + offset).dot(second.sigma + offset))
    if np.iscomplexobj(root):
        if not np.allclose(np.diagonal(root).imag, 0, atol=MAX_IMAGINARY):
            largest = np.abs(root.imag).max()
            raise ValueError(f"the root of the covariances' product has imaginary parts up to {largest}")
        root = root.real
    return float(apart.dot(apart) + np.trace(first.sigma) + np.trace(second.sigma) - 2 * np.trace(root))
