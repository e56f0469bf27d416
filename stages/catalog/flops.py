"""FLOPs of a job's models, by formula: what the files beside it reckon their steps' work with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graftwork.specs.costs import Cost, GraftCost, block_cost, embedding_cost, graft_cost, rootstock_cost
from graftwork.specs.operators import Place
from graftwork.specs.rootstock import Model
from graftwork.specs.solve import CostName, Limits
from graftwork.stages.stage import Work

if TYPE_CHECKING:
    from graftwork.specs.edits import Edit
    from graftwork.specs.job import JobSpec
    from graftwork.specs.sampler import AnySampler
    from graftwork.specs.training import TrainingSpec

TRAINING = 3  # passes that a training step comes to: backward is two of forward


@dataclass(frozen=True)
class RootstockFlops:
    """A job's rootstock, but for its classes, which matter to parameters only."""

    model: Model
    place: Place
    channels: int

    @classmethod
    def of(cls, job: JobSpec) -> RootstockFlops:
        return cls(job.model, job.place(), job.codec.latent_channels(job.data))

    @property
    def cost(self) -> Cost:
        return rootstock_cost(self.model, self.place, self.channels, num_classes=1)

    def whole(self) -> int:
        """Of a pass of one sample."""
        return self.cost.flops

    def up_to(self, block: int) -> int:
        """Of a pass of one sample that ends with that block."""
        embedding = embedding_cost(self.model, self.place, self.channels, num_classes=1)
        return embedding.flops + (block + 1) * block_cost(self.place, self.model).flops


def training(recipe: TrainingSpec, flops: int) -> Work:
    """Return the work of a training. flops: of a pass of one sample."""
    return Work(float(TRAINING * flops * recipe.steps * recipe.batch))


def sampling(sampler: AnySampler, flops: int, samples: int) -> Work:
    """Return the work of drawing samples. flops: of a pass of one sample, of which guidance takes two."""
    passes = sampler.evaluations() * (1 if sampler.guidance == 1 else 2)
    return Work(float(flops * passes * samples))


def graft_flops(job: JobSpec) -> int:
    """Return those of a pass of one sample through the graft; edits that a checkpoint carries are not counted."""
    return cost_of_graft(job, RootstockFlops.of(job).cost).graft.flops


def cost_of_graft(job: JobSpec, rootstock: Cost, carried: tuple[Edit, ...] = ()) -> GraftCost:
    """Return what the job's graft costs beside its rootstock. carried: edits that the rootstock's weights come with.

    Where evidence chooses, any of the candidates will do: blocks are all of one shape. What a solver will choose is not
    known: of that it is the original of every site, or what limits leave.
    """
    depth, solved = job.model.depth, job.solved()
    made = [
        edit
        for number, spec in enumerate(job.graft)
        if number not in solved
        for edit in spec.edits(depth)[: spec.number(depth)]
    ]
    cost = graft_cost(rootstock, made, job.place(), carried)
    return cost if job.solve is None else replace(cost, graft=_within(job.solve.limits, cost))


def _within(limits: Limits, cost: GraftCost) -> Cost:
    """Return the most that limits leave of what a model costs with the originals in the sites that are solved for."""

    def most(name: CostName, of_rootstock: int, whole: int) -> int:
        limit = limits.by_cost().get(name)
        bound = limit.bounds(name, of_rootstock)[1] if limit is not None else None
        return whole if bound is None else min(whole, round(bound))

    rootstock, graft = cost.rootstock, cost.graft
    return Cost(most("params", rootstock.params, graft.params), most("flops", rootstock.flops, graft.flops))
