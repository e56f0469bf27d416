"""How near attention looks: its mass within each band, by distance along the sequence and in the image's plane.

Tokens are the patches of an image, rows first, so the displacement from a query to a key, (rows, columns), tells both
distances: |rows * width + columns| tokens, max(|rows|, |columns|) patches. Attention is summed by displacement, in
chunks, and what is kept does not grow with what was seen.

Shapes: B samples, N = height * width tokens, D channels, H heads, E = D / H, M maps (one a sample and head), G rows of
queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.models.objectives import QUARTERS
from graftwork.models.operators.attention import Attention, split_heads

CHUNK_BYTES = 64 * 2**20
FLOAT_BYTES = 4
AT_ONCE = 4  # as large as a chunk's attention: of a single map its sum, that flipped, and padded to twice the size


@dataclass(frozen=True)
class BandMass:
    """The share of attention within each distance, averaged over samples, heads and queries."""

    tokens: Tensor  # (N,): entry k has |i - j| <= k
    patches: Tensor  # (the longer side,): entry k has rows and columns that are no more than k apart


class Locality:
    """Gathers where the attention of one site goes, for each quarter of the noise levels."""

    def __init__(self, grid: tuple[int, int], device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Begin with no attention seen.

        grid: rows and columns of tokens. chunk_bytes: of attention in memory at once; one row of queries of one map is
        taken in any case.
        """
        self.height, self.width = grid
        self.chunk_floats = chunk_bytes // (AT_ONCE * FLOAT_BYTES)
        # Displacements -(height - 1) .. height - 1 by rows, and likewise by columns.
        self.mass = torch.zeros(QUARTERS, 2 * self.height - 1, 2 * self.width - 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, attention: Attention, x: Tensor, quarters: Tensor) -> None:
        """Add the operator's attention over its input x (B,N,D), seen in these quarters (B,) of the noise levels."""
        for quarter in range(QUARTERS):
            for first_row, chunk in self._chunks(attention, x[quarters == quarter]):
                last_row = first_row + len(chunk) // self.width
                # Of displacements by rows, key - query, those that this chunk has.
                rows = slice(self.height - last_row, 2 * self.height - 1 - first_row)
                self.mass[quarter, rows] += by_displacement(chunk, self.width)

    def _chunks(self, attention: Attention, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first row of the queries, and attention summed over maps (G*width,N)."""
        num_tokens = self.height * self.width
        num_maps = max(1, self.chunk_floats // num_tokens**2)
        num_rows = min(self.height, max(1, self.chunk_floats // (self.width * num_tokens)))
        for samples in x.split(max(1, num_maps // attention.heads)):
            q, k, _ = split_heads(attention.qkv(samples), attention.heads)
            q, k = (a.transpose(1, 2).flatten(0, 1).float() for a in (q, k))  # (M,N,E)
            q = q * q.shape[-1] ** -0.5
            for queries, keys in zip(q.split(num_maps), k.split(num_maps), strict=True):
                for row in range(0, self.height, num_rows):
                    part = queries[:, row * self.width : (row + num_rows) * self.width]
                    yield row, (part @ keys.transpose(1, 2)).softmax(-1).sum(0)

    def overall(self) -> BandMass:
        """Return the mass over all noise levels."""
        return self._curves(self.mass.sum(0))

    def by_quarter(self) -> tuple[BandMass | None, ...]:
        """Return the mass by quarter, from the least noise to the most; None where no sample was in it."""
        return tuple(self._curves(mass) if mass.any() else None for mass in self.mass)

    def _curves(self, mass: Tensor) -> BandMass:
        by_rows, by_columns = (torch.arange(1 - side, side) for side in (self.height, self.width))
        rows, columns = torch.meshgrid(by_rows, by_columns, indexing="ij")
        tokens = (rows * self.width + columns).abs()
        patches = torch.maximum(rows.abs(), columns.abs())
        longest = max(self.height, self.width)
        return BandMass(_cumulated(mass, tokens, self.height * self.width), _cumulated(mass, patches, longest))


def by_displacement(attention: Tensor, width: int) -> Tensor:
    """Sum attention (G*width,N) of G consecutive rows of queries over equal displacements: (G+height-1, 2*width-1).

    Row 0 of the result is what the last row of queries gives to the first row of keys.
    """
    grid = attention.unflatten(0, (-1, width)).unflatten(2, (-1, width))  # query row, query column, key row, key column
    by_columns = diagonals(grid.transpose(1, 2)).double()  # query row, key row, displacement
    return diagonals(by_columns.movedim(-1, 0)).T


def diagonals(matrices: Tensor) -> Tensor:
    """Sums of the diagonals of (..,A,B), from the lowest left to the upper right: (..,A+B-1).

    Each row is moved one further than the row below it, so that diagonals stand in columns. Not a scatter, which on a
    GPU adds in an order of its own.
    """
    height = matrices.shape[-2]
    moved = F.pad(matrices.flip(-2), (0, height)).flatten(-2)[..., :-height].unflatten(-1, (height, -1))
    return moved.sum(-2)


def _cumulated(mass: Tensor, distances: Tensor, count: int) -> Tensor:
    """The share of the mass at distances up to 0, 1, .., count - 1."""
    by_distance = torch.zeros(count, dtype=torch.float64).index_add_(0, distances.flatten(), mass.cpu().flatten())
    curve = by_distance.cumsum(0)
    return curve / curve[-1]
