"""Improved precision and recall (arXiv 1904.06991): whether images lie among the nearest neighbours of others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_NEIGHBOURS = 3  # as in the paper and in the ADM suite's evaluator
BLOCK_IMAGES = 4096  # along each side of a block of distances: 64 MiB


def precision_recall_hits(
    samples: NDArray[np.float32], reference: NDArray[np.float32], device: torch.device
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which samples (n,) lie among the reference, and which reference images (m,) lie among the samples.

    An image lies among others if it is no farther from one of them than that one's third neighbour is, itself left
    out. samples: features (n,d); reference: (m,d); n and m above NUM_NEIGHBOURS. Their means are precision and recall.
    """
    # About a centre that both share, so that float32 keeps the digits of distances that are small beside the features.
    centre = reference.mean(0, dtype=np.float64).astype(np.float32)
    ours, theirs = (torch.from_numpy(features - centre).to(device) for features in (samples, reference))
    our_radii, their_radii = neighbour_radii(ours), neighbour_radii(theirs)
    precise = torch.zeros(len(ours), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(theirs), dtype=torch.bool, device=device)
    for rows, columns in _blocks(len(ours), len(theirs)):
        distances = squared_distances(ours[rows], theirs[columns])
        precise[rows] |= (distances <= their_radii[columns]).any(1)
        recalled[columns] |= (distances <= our_radii[rows, None]).any(0)
    return precise.cpu().numpy(), recalled.cpu().numpy()


def neighbour_radii(features: Tensor) -> Tensor:
    """Return the squared distance (n,) of each to its third neighbour, itself left out. features: (n,d)."""
    nearest = features.new_full((len(features), NUM_NEIGHBOURS), torch.inf)
    for rows, columns in _blocks(len(features), len(features)):
        distances = squared_distances(features[rows], features[columns])
        if rows == columns:
            distances.fill_diagonal_(torch.inf)
        candidates = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = candidates.topk(NUM_NEIGHBOURS, largest=False, sorted=True).values
    return nearest[:, -1]


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return |x - y|^2 (n,m) of features (n,d) and (m,d)."""
    squares = first.square().sum(1, keepdim=True) + second.square().sum(1)
    return squares.addmm_(first, second.T, alpha=-2).clamp_(min=0)


def _blocks(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, num_rows, BLOCK_IMAGES):
        for column in range(0, num_columns, BLOCK_IMAGES):
            yield (
                slice(row, min(row + BLOCK_IMAGES, num_rows)),
                slice(column, min(column + BLOCK_IMAGES, num_columns)),
            )
