"""How near attention looks: its mass within each band, by distance along the sequence and in the image's plane.

Tokens are the patches of a square image, rows first, so the displacement from a query to a key, (rows, columns), tells
both distances: |rows * side + columns| tokens, max(|rows|, |columns|) patches. Attention is summed by displacement, in
chunks, and what is kept does not grow with what was seen.

Shapes: B samples, N = side^2 tokens, D width, H heads, E = D / H, M maps (one a sample and head), G rows of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.models.objectives.gaussian import STEPS
from graftwork.models.operators.attention import Attention, split_heads

QUARTERS = 4  # of the timesteps
CHUNK_BYTES = 64 * 2**20
FLOAT_BYTES = 4
AT_ONCE = 4  # as large as a chunk's attention: of a single map its sum, that flipped, and padded to twice the size


@dataclass(frozen=True)
class BandMass:
    """The share of attention within each distance, averaged over samples, heads and queries."""

    tokens: Tensor  # (N,): entry k has |i - j| <= k
    patches: Tensor  # (side,): entry k has rows and columns that are no more than k apart


class Locality:
    """Gathers where the attention of one site goes, for each quarter of the timesteps."""

    def __init__(self, side: int, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        """chunk_bytes: of attention in memory at once; one row of queries of one map is taken in any case."""
        self.side = side
        self.chunk_floats = chunk_bytes // (AT_ONCE * FLOAT_BYTES)
        reach = 2 * side - 1  # displacements -(side - 1) .. side - 1 along each axis
        self.mass = torch.zeros(QUARTERS, reach, reach, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, attention: Attention, x: Tensor, t: Tensor) -> None:
        """See the operator attend over its input x (B,N,D), at timesteps t (B,)."""
        for quarter in range(QUARTERS):
            chosen = x[t * QUARTERS // STEPS == quarter]
            for first_row, chunk in self._chunks(attention, chosen):
                last_row = first_row + len(chunk) // self.side
                # Of displacements by rows, key - query, those that this chunk has.
                rows = slice(self.side - last_row, 2 * self.side - 1 - first_row)
                self.mass[quarter, rows] += by_displacement(chunk, self.side)

    def _chunks(self, attention: Attention, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first row of the queries, and attention summed over maps (G*side,N)."""
        num_tokens = self.side**2
        num_maps = max(1, self.chunk_floats // num_tokens**2)
        num_rows = min(self.side, max(1, self.chunk_floats // (self.side * num_tokens)))
        for samples in x.split(max(1, num_maps // attention.heads)):
            q, k, _ = split_heads(attention.qkv(samples), attention.heads)
            q, k = (a.transpose(1, 2).flatten(0, 1).float() for a in (q, k))  # (M,N,E)
            q = q * q.shape[-1] ** -0.5
            for queries, keys in zip(q.split(num_maps), k.split(num_maps), strict=True):
                for row in range(0, self.side, num_rows):
                    part = queries[:, row * self.side : (row + num_rows) * self.side]
                    yield row, (part @ keys.transpose(1, 2)).softmax(-1).sum(0)

    def overall(self) -> BandMass:
        """Over all timesteps."""
        return self._curves(self.mass.sum(0))

    def by_quarter(self) -> tuple[BandMass | None, ...]:
        """At t in 0 .. 249, 250 .. 499, and so on; None where no sample had such a timestep."""
        return tuple(self._curves(mass) if mass.any() else None for mass in self.mass)

    def _curves(self, mass: Tensor) -> BandMass:
        steps = torch.arange(1 - self.side, self.side)
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        tokens = (rows * self.side + columns).abs()
        patches = torch.maximum(rows.abs(), columns.abs())
        return BandMass(_cumulated(mass, tokens, self.side**2), _cumulated(mass, patches, self.side))


def by_displacement(attention: Tensor, side: int) -> Tensor:
    """Sum attention (G*side,N) of G consecutive rows of queries over equal displacements: (G+side-1, 2*side-1).

    Row 0 of the result is what the last row of queries gives to the first row of keys.
    """
    grid = attention.unflatten(0, (-1, side)).unflatten(2, (side, side))  # query row, query column, key row, key column
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
