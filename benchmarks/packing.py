"""How near packing comes to the least makespan: the real `pack()`, from 1 to 1,000 GPUs, whole or shared, and up to
1,000 sites.

    python -m benchmarks.packing [--gpus 1 8 1000] [--sites 28 1000] [--json FILE]

The packs are played through as Ray does it, each slot that falls free taking the next, and the makespan is held
against a lower bound for any schedule whatsoever, however large its packs, that respects the memory. The bound
(`lower_bound`) is here what the hardware's peak is elsewhere: the floor.

Costs: equal; those of DiT-XL/2 by depth, where every fourth site is an MLP's and operators take turns; two sizes; and
lognormal. A pass of the rootstock costs what it costs for DiT-XL/2, 0.22 of a Hyena site's 200 epochs. Memory: what
the sites of DiT-XL/2 need of an H200's, or 15, 30 or 50% of the task's own.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from benchmarks.command_line import parser
from benchmarks.report import show
from graftwork.pipeline.estimates.packing import MOST, Item, makespan, pack
from graftwork.specs.costs import operator_cost, rootstock_cost
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Mamba2, Mlp, Place, Swa
from graftwork.specs.rootstock import DitModel
from graftwork.specs.training import DistillSpec

GPUS = (1, 2, 3, 5, 8, 13, 32, 64, 128, 250, 500, 1000)
SHARES = (1.0, 0.5, 0.25)
SITES = (3, 14, 28, 56, 100, 300, 1000)
GPU_MEMORY = 141e9  # of an H200
MODEL, PLACE = DitModel(size="XL/2"), Place(width=1152, heads=16, num_tokens=256)
TOLERANCE = 1e-9
FUNCTIONS = (1, 2, 3, 4, 5, 6)  # u(k), dual feasible
NEAR = 1.04  # of a simple bound: a stronger one is not sought
FAR = 1.08  # from all others: the strongest is sought too
KINDS, FILLINGS = 30, 150_000  # of items, and ways to fill a slot, that are listed at most

Sizes = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One simulated case."""

    costs: str
    memory: str
    gpus: int
    share: float
    sites: int
    ratio: float  # makespan over the lower bound
    pack_seconds: float  # CPU seconds of pack() itself

    @property
    def packed(self) -> bool:
        """Whether there are more sites than slots."""
        return self.sites > slots_of(self.gpus, self.share)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    arguments.add_argument("--sites", type=int, nargs="+", default=SITES)
    asked = arguments.parse_args()
    cells = list(simulated(asked.gpus, asked.sites))
    groups = dict.fromkeys((cell.costs, cell.memory) for cell in cells)
    rows = [row(*group, [one for one in cells if (one.costs, one.memory) == group]) for group in groups]
    worst = max(cells, key=lambda cell: cell.ratio)
    facts = {
        "cells": len(cells),
        "within 10%": sum(cell.ratio <= 1.1 for cell in cells),
        "worst": f"{worst.ratio:.3f} at {worst}",
        "pack() at most, CPU seconds": max(cell.pack_seconds for cell in cells),
        "pack() of 1,000 sites on 1,000 GPUs, and on fewer slots, CPU seconds": timed_pack(1000, 1000),
        "items in a pack, at most": MOST,
    }
    show("Makespan over its lower bound", rows, facts, asked.json)


def row(costs: str, memory: str, cells: Sequence[Cell]) -> dict[str, Any]:
    packed = [cell for cell in cells if cell.packed]
    worst = max(cells, key=lambda cell: cell.ratio)
    return {
        "costs": costs,
        "memory": memory,
        "cells": len(cells),
        "more sites than slots": len(packed),
        "median of those": statistics.median(cell.ratio for cell in packed) if packed else math.nan,
        "worst": worst.ratio,
        "worst at": f"{worst.sites} sites, {worst.gpus} x {worst.share:g} GPU",
    }


def simulated(gpus: Iterable[int], sites: Sequence[int]) -> Iterator[Cell]:
    for count in gpus:
        for share in SHARES:
            for number in sites:
                for costs in COSTS:
                    for memory in ("DiT-XL/2", "mixed"):
                        yield simulate(costs, memory, count, share, number)


def simulate(costs: str, memory: str, gpus: int, share: float, sites: int) -> Cell:
    """Pack one case, play it through, and check that its limits are respected."""
    items, shared_seconds = case(costs, memory, share, sites)
    slots, room = slots_of(gpus, share), GPU_MEMORY * share
    start = time.process_time()
    packs = pack(items, slots, shared_seconds, room)
    elapsed = time.process_time() - start
    assert sorted(item.name for one in packs for item in one) == sorted(item.name for item in items)
    assert all(len(one) == 1 or sum(item.memory for item in one) <= room * (1 + TOLERANCE) for one in packs)
    reached = makespan(packs, slots, shared_seconds)
    bound = lower_bound(items, slots, shared_seconds, room, reached)
    assert bound <= reached * (1 + TOLERANCE), "no schedule is below the bound"
    return Cell(costs, memory, gpus, share, sites, reached / bound, elapsed)


def slots_of(gpus: int, share: float) -> int:
    return gpus * int(1 / share)


def timed_pack(sites: int, gpus: int) -> float:
    """The longest for whole and shared GPUs, and for a half and a third as many, where there is something to pack."""
    slots = [slots_of(gpus, share) for share in SHARES] + [gpus // 2, gpus // 3]
    items, shared_seconds = case("lognormal", "mixed", 1.0, sites)
    found = []
    for count in slots:
        start = time.process_time()
        pack(items, count, shared_seconds, GPU_MEMORY)
        found.append(time.process_time() - start)
    return max(found)


# -- what is packed


def case(costs: str, memory: str, share: float, sites: int) -> tuple[list[Item], float]:
    """The sites, in PFLOP, and the pass that they share. The same for the same arguments."""
    draws = random.Random(f"{costs} {memory} {share} {sites}")
    seconds = COSTS[costs](draws, sites)
    site, room = activations(), GPU_MEMORY * share
    bytes_each = [site if memory == "DiT-XL/2" else room * draws.choice((0.15, 0.3, 0.5)) for _ in range(sites)]
    items = [Item(str(i), one, size) for i, (one, size) in enumerate(zip(seconds, bytes_each, strict=True))]
    return items, shared_pass()


def distillation(operator: Any) -> float:
    """PFLOP of a site by the published recipe: training and, after every epoch, the held-out samples."""
    recipe = DistillSpec()
    return operator_cost(operator, PLACE).flops * recipe.epochs * recipe.samples * (3 + 1) / 1e15


def shared_pass() -> float:
    """PFLOP of the rootstock's pass over training and held-out samples, up to the last block."""
    return rootstock_cost(MODEL, PLACE, 4, 1000).flops * 2 * DistillSpec().samples / 1e15


def activations() -> float:
    """Bytes of a site's inputs and outputs in bf16, training and held-out samples."""
    return 2 * DistillSpec().samples * PLACE.num_tokens * PLACE.width * 2 * 2.0


def by_depth(_: random.Random, sites: int) -> list[float]:
    attention = (HyenaSE(), HyenaX(), HyenaY(), Swa(), Mamba2())
    return [distillation(Mlp(ratio=3 + i % 2 * 3) if i % 4 == 3 else attention[i % 5]) for i in range(sites)]


HYENA = distillation(HyenaY())
COSTS = {
    "equal": lambda draws, sites: [HYENA] * sites,
    "DiT-XL/2": by_depth,
    "two sizes": lambda draws, sites: [HYENA * draws.choice((1.0, 0.35)) for _ in range(sites)],
    "lognormal": lambda draws, sites: [HYENA * draws.lognormvariate(0, 0.7) for _ in range(sites)],
}


# -- the lower bound


def lower_bound(items: Sequence[Item], slots: int, shared: float, memory: float, reached: float = math.inf) -> float:
    """Seconds below which no schedule ends in which the items that a pass serves fit the memory together.

    Each item's share of a pass is replaced by one that no pass can exceed in sum (`shares`), which leaves a plain
    problem of parallel machines for each kind of share; the best bound counts. reached: a makespan that is reached; a
    bound that is near it is not improved.
    """
    seconds = np.array([item.seconds for item in items])
    if len(items) <= slots:
        return float(seconds.max()) + shared
    parts = [*shares(items, memory)]
    best = max(shared + float(max(seconds.max(), seconds.sum() / slots)), _crowded(seconds, parts, slots, shared))
    best = max(best, *(float((seconds + shared * part).sum()) / slots for part in parts))
    for part in parts if shared else ():
        best = max(best, machines_bound(seconds + shared * part, slots, best, reached))
    best = max(best, shared + machines_bound(seconds, slots, best - shared, reached - shared))
    return best if reached <= best * FAR else fillings_bound(items, parts, slots, shared, best, reached)


def shares(items: Sequence[Item], memory: float) -> Iterator[Sizes]:
    """Shares of a pass, of each item, whose sum over the items of one pass is at most 1, through dual feasible
    functions of the memory (Fekete and Schepers 2001)."""
    needed = np.minimum([item.memory / memory for item in items], 1.0)
    yield needed
    for k in FUNCTIONS:
        yield rounded(needed, k)


def rounded(sizes: Sizes, k: int) -> Sizes:
    """The dual feasible function u(k): of sizes that sum to at most 1, the results do so too."""
    return np.maximum(np.floor((k + 1) * sizes - TOLERANCE), 0) / k


def _crowded(seconds: Sizes, parts: Sequence[Sizes], slots: int, shared: float) -> float:
    """Of the k * slots + 1 longest, some slot has k + 1: at least the shortest of them, and their passes."""
    longest_first = np.sort(seconds)[::-1]
    below = [0.0, *accumulate(longest_first.tolist())]
    passes = [np.ceil(np.cumsum(np.sort(part)) - TOLERANCE) for part in parts]  # of the 1, 2, .. that need least
    best = 0.0
    for k in range(1, (len(seconds) - 1) // slots + 1):
        last = k * slots + 1
        needed = max(float(one[k]) for one in passes)
        best = max(best, below[last] - below[last - k - 1] + shared * needed)
    return best


def machines_bound(seconds: Sizes, slots: int, low: float, reached: float) -> float:
    """Makespan that plain parallel machines cannot be below: the largest for which a bound on bin packing shows that
    the items do not fit (Dell'Amico and Martello 1995), by bisection above `low`."""
    high = reached
    if low * NEAR >= high or math.isinf(high):
        return low
    for _ in range(7):
        middle = (low + high) / 2
        if bins(seconds / middle) > slots:
            low = middle
        else:
            high = middle
    return low


def bins(sizes: Sizes) -> int:
    """Bins of size 1 that items need at least (Fekete and Schepers 2001, section 3)."""
    if sizes.max() > 1 + TOLERANCE:
        return len(sizes) + 1
    most = 0.0
    thresholds = np.unique(np.round(sizes[(sizes <= 0.5) & (sizes > 0.1)], 6))
    for threshold in [0.0, *thresholds[:: max(1, len(thresholds) // 12)]]:
        # Beside what is larger than 1 - threshold nothing of at least the threshold fits.
        kept = np.where(sizes > 1 - threshold + TOLERANCE, 1.0, np.where(sizes >= threshold, sizes, 0.0))
        most = max(most, float(kept.sum()), *(float(rounded(kept, k).sum()) for k in FUNCTIONS))
    return math.ceil(most - 1e-6)


def fillings_bound(
    items: Sequence[Item], parts: Sequence[Sizes], slots: int, shared: float, low: float, high: float
) -> float:
    """The largest makespan for which even fractions of slots cannot hold all items (Gilmore and Gomory's linear
    programme over all ways to fill a slot), by bisection; `low` where the ways are too many to list."""
    kinds: dict[tuple[float, ...], int] = Counter(
        zip((item.seconds for item in items), *(part.tolist() for part in parts), strict=True)
    )
    for _ in range(7 if len(kinds) <= KINDS else 0):
        middle = (low + high) / 2
        fillings = list(islice(_fillings(list(kinds.items()), middle, shared), FILLINGS + 1))
        if len(fillings) > FILLINGS:
            break
        columns = np.array(fillings, dtype=np.float64).T
        found = linprog(np.ones(len(fillings)), -columns, -np.array([*kinds.values()], dtype=np.float64))
        if not found.success or found.fun > slots + 1e-6:
            low = middle
        else:
            high = middle
    return low


def _fillings(
    kinds: Sequence[tuple[tuple[float, ...], int]], within: float, shared: float, sums: Sequence[float] | None = None
) -> Iterator[tuple[int, ...]]:
    """How many of each kind (seconds, shares of a pass) a slot can hold within so many seconds, or more."""
    (kind, count), *others = kinds
    sums = sums or [0.0] * len(kind)
    for number in range(count + 1):
        together = [total + number * one for total, one in zip(sums, kind, strict=True)]
        if together[0] + shared * math.ceil(max(together[1:]) - TOLERANCE) > within:
            return
        if others:
            for rest in _fillings(others, within, shared, together):
                yield number, *rest
        else:
            yield (number,)


if __name__ == "__main__":
    main()
