"""How sure a comparison of two rows is: a bootstrap over prompts, of which each row has the same images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 0
INTERVAL_PERCENT = (2.5, 97.5)
MAX_DRAWN = 2**22  # prompts at a time: 32 MiB of their numbers


def mean_with_interval(values: NDArray[np.float64], groups: NDArray[Any]) -> tuple[float, float, float]:
    """Return the mean of values (n,), and the bounds of its 95% interval in draws of whole groups.

    groups: what each value is of, (n,), such as its prompt.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(numbers, values), np.bincount(numbers)
    low, high = interval(resampled_means(sums, counts, np.random.default_rng(BOOTSTRAP_SEED), NUM_BOOTSTRAP_DRAWS))
    return float(values.mean()), low, high


def resampled_means(
    sums: NDArray[np.float64 | np.int64], counts: NDArray[np.int64], generator: np.random.Generator, num_draws: int
) -> NDArray[np.float64]:
    """Return the mean over images (num_draws,) in draws of as many prompts as there are, with replacement.

    sums: of each prompt's images, (P,); counts: how many these are, (P,).
    """
    at_once = max(1, MAX_DRAWN // len(sums))
    means = [np.empty(0)]
    for start in range(0, num_draws, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, num_draws - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Return the bounds between which 95% of the draws lie."""
    low, high = np.percentile(draws, INTERVAL_PERCENT)
    return float(low), float(high)
