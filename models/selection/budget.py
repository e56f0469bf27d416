"""A budget of FLOPs for a whole model, of whose sites each holds its original or one of several scions.

During a search the expected cost is pulled towards the budget; in the end what the sites hold is chosen within it,
exactly. What is not in a site costs the same whatever the sites hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from graftwork.models.rootstocks import RootstockConfig
from graftwork.specs.costs import BUDGET_TOLERANCE, graft_cost, rootstock_cost
from graftwork.specs.edits import Edit


@dataclass(frozen=True)
class Budget:
    """What a model may cost, and what its sites do: FLOPs of a forward pass of one sample, as in `specs.costs`."""

    share: float  # of the rootstock's FLOPs
    rootstock: int
    sites: Mapping[int, tuple[int, ...]]  # by block: what each holding costs, the original's first

    def flops(self, holds: Mapping[int, int]) -> int:
        """Of the model whose sites hold that, by block: 0 the original, 1 .. a scion."""
        return self.rootstock + sum(costs[holds[block]] - costs[0] for block, costs in self.sites.items())

    def meets(self, flops: int) -> bool:
        return abs(flops / self.rootstock - self.share) <= BUDGET_TOLERANCE * self.share

    def expected_share(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Mean FLOPs over the rootstock's, of models drawn with these probabilities of each site's holdings."""
        share = probabilities[0].new_ones(())
        for values, costs in zip(probabilities, self.sites.values(), strict=True):
            share = share + values @ values.new_tensor([(cost - costs[0]) / self.rootstock for cost in costs])
        return share

    def miss(self, probabilities: Sequence[Tensor]) -> Tensor:
        """The squared distance of the expected cost from the budget, relative to the budget."""
        return (self.expected_share(probabilities) / self.share - 1).square()

    def best(self, scores: Mapping[int, Sequence[float]]) -> dict[int, int]:
        """What the sites hold, by block, so that the model meets the budget and the sum of scores is the largest.

        scores: by block, of each holding. Raises ValueError where nothing meets the budget.
        """
        # By site: the best score with which the sites so far bring the model to that many FLOPs, and the last holding.
        # Sites cost alike, so these totals are few: as many as there are counts of each holding, not as their orders.
        reached: dict[int, tuple[float, int]] = {
            self.rootstock - sum(costs[0] for costs in self.sites.values()): (0, 0)
        }
        table: list[dict[int, tuple[float, int]]] = []
        for (block, costs), (low, high) in zip(self.sites.items(), self._windows(), strict=True):
            after: dict[int, tuple[float, int]] = {}
            for total, (score, _) in reached.items():
                for holding, (cost, value) in enumerate(zip(costs, scores[block], strict=True)):
                    here = total + cost
                    if low <= here <= high and (here not in after or score + value > after[here][0]):
                        after[here] = (score + value, holding)
            table.append(after)
            reached = after
        fitting = [total for total in reached if self.meets(total)]
        if not fitting:
            raise ValueError(f"no choice of operators comes within 2% of {self.share:g} of the rootstock's FLOPs")
        total, holds = max(fitting, key=lambda fit: reached[fit][0]), {}
        for block, after in zip(reversed([*self.sites]), reversed(table), strict=True):
            holds[block] = after[total][1]
            total -= self.sites[block][holds[block]]
        return {block: holds[block] for block in self.sites}

    def _windows(self) -> list[tuple[float, float]]:
        """After each site: the totals from which the sites that follow can still meet the budget, and one more each."""
        target, later = self.share * self.rootstock, list(self.sites.values())[:0:-1]
        cheapest = [*accumulate(map(min, later), initial=0)][::-1]
        dearest = [*accumulate(map(max, later), initial=0)][::-1]
        low, high = target * (1 - BUDGET_TOLERANCE) - 1, target * (1 + BUDGET_TOLERANCE) + 1
        return [(low - most, high - least) for least, most in zip(cheapest, dearest, strict=True)]


def budget_of(share: float, config: RootstockConfig, carried: Sequence[Edit], candidates: Sequence[Edit]) -> Budget:
    """That share of what a rootstock costs, with the edits that it carries already; its originals are what stands.

    candidates: at each site, in the order of their options. Raises ValueError where no choice of them meets it.
    """
    bare = rootstock_cost(config, config.place, config.in_channels, config.num_classes)
    sites: dict[int, tuple[int, ...]] = {}
    for edit in candidates:
        cost = graft_cost(bare, [edit], config.place, carried)
        sites[edit.site.block] = (*sites.get(edit.site.block, (cost.replaced.flops,)), cost.scions.flops)
    budget = Budget(share, graft_cost(bare, (), config.place, carried).rootstock.flops, sites)
    budget.best({block: [0.0] * len(costs) for block, costs in sites.items()})
    return budget
