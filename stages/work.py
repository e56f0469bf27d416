"""The work of each step, by formula: what the planner puts into a step, and its manifest keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from graftwork.specs import params
from graftwork.specs.costs import Cost, block_cost, embedding_cost, graft_cost, rootstock_cost, scion_cost
from graftwork.specs.edits import Parallel
from graftwork.specs.fields import Spec
from graftwork.specs.operators import Place
from graftwork.specs.rootstock import Model, PretrainWeights
from graftwork.specs.training import Precision

TRAINING = 3  # passes that a training step comes to: backward is two of forward


T = TypeVar("T", bound=Spec)

SPREADING = (params.SampleParams, params.FeaturesParams)  # steps that take whatever of the machine is free

# -- FLOPs


@dataclass(frozen=True)
class Work:
    """FLOPs of a step."""

    own: float
    shared: float = 0.0  # of the rootstock's pass, which steps of its kind can share
    activations: int = 0  # bytes that it keeps of that pass: what an operator sees and puts out for all samples

    @property
    def total(self) -> float:
        return self.own + self.shared


@dataclass(frozen=True)
class StepInputs:
    """What the FLOPs of a step of a plan are computed from."""

    params: Spec
    needs: Mapping[str, str]  # role -> key
    outside: Mapping[str, Any]

    @property
    def workers(self) -> int:
        """That share its work."""
        match self.params:
            case params.BaseParams(weights=PretrainWeights(workers=workers)):
                return workers
            case params.FinetuneParams(recipe=recipe) | params.SearchParams(recipe=recipe):
                return recipe.workers
        return 1

    @property
    def precision(self) -> Precision:
        """Of its products."""
        match self.params:
            case params.BaseParams(weights=PretrainWeights(precision=precision)):
                return precision
            case params.ProfileParams(precision=precision) | params.SampleParams(precision=precision):
                return precision
            case (
                params.DistillParams(recipe=recipe)
                | params.FinetuneParams(recipe=recipe)
                | params.SearchParams(recipe=recipe)
            ):
                return recipe.precision
        return "fp32"

    @property
    def spreads(self) -> bool:
        """Whether it spreads its work over whatever is free."""
        return isinstance(self.params, SPREADING)


@dataclass(frozen=True)
class Rootstock:
    """A rootstock's shape."""

    model: Model
    place: Place
    channels: int

    @property
    def cost(self) -> Cost:
        """But for its classes, which matter to parameters only."""
        return rootstock_cost(self.model, self.place, self.channels, num_classes=1)

    @property
    def flops(self) -> int:
        """Of a pass of one sample."""
        return self.cost.flops

    def up_to(self, block: int) -> int:
        """Of a pass of one sample that ends with that block."""
        embedding = embedding_cost(self.model, self.place, self.channels, num_classes=1)
        return embedding.flops + (block + 1) * block_cost(self.place).flops


class Formulas:
    """The work of a plan's steps, by their keys."""

    def __init__(self, known: Callable[[str], StepInputs]) -> None:
        """known: the step with that key; raises KeyError."""
        self.known = known
        self._forward = cache(self._forward_of)

    def work(self, key: str) -> Work | None:
        """Return the work of the step with that key; None if there is no formula, or its numbers make no sense."""
        try:
            return self._work(self.known(key))
        except (KeyError, ArithmeticError):
            return None

    def _work(self, step: StepInputs) -> Work | None:
        told, flops = step.params, None
        match told:
            case params.BaseParams(weights=PretrainWeights() as recipe):
                flops = TRAINING * self._rootstock(step.needs["features"], told).flops * recipe.steps * recipe.batch
            case params.ProfileParams(samples=samples):
                flops = self._of(step).flops * samples
            case params.SearchParams(recipe=recipe, candidates=candidates):
                rootstock = self._of(step)
                both = rootstock.flops + sum(scion_cost(edit, rootstock.place).flops for edit in candidates)
                flops = TRAINING * both * recipe.steps * recipe.batch
            case params.FinetuneParams(recipe=recipe):
                flops = TRAINING * self._trained(step) * recipe.steps * recipe.batch
            case params.SampleParams(sampler=sampler, samples=samples):
                passes = sampler.evaluations() * (1 if sampler.guidance == 1 else 2)
                flops = self._trained(step) * passes * samples
            case params.DistillParams():
                return self._distillation(step, told)
        return None if flops is None else Work(float(flops))

    def _distillation(self, step: StepInputs, told: params.DistillParams) -> Work:
        """Section 4 of the method: the pass up to the site's block, then epochs over what it left."""
        rootstock, recipe = self._of(step), told.recipe
        shown, heldout = recipe.samples * recipe.draws, recipe.heldout or recipe.samples
        scion = scion_cost(told.edit, rootstock.place).flops
        last = told.edit.site.block
        if isinstance(told.edit.operator, Parallel):  # both blocks learn, and a projection that merges them
            scion += 2 * block_cost(rootstock.place).flops
            last += 1
        taken = "scions" in step.outside  # from another graft: it is only measured
        own = scion * (heldout if taken else recipe.epochs * (TRAINING * shown + heldout))
        shared = rootstock.up_to(last) * (shown + heldout)
        values = 2 * (shown + heldout) * rootstock.place.num_tokens * rootstock.place.width
        return Work(float(own), float(shared), values * (2 if recipe.precision == "bf16" else 4))

    def _trained(self, step: StepInputs) -> int:
        """FLOPs of a pass of one sample through the model that the step trains or samples from."""
        for role, needed in step.needs.items():
            if role.startswith("finetuned/"):
                return self._trained(self.known(needed))
        if "select" not in step.needs:
            return self._of(step).flops
        return self._forward(step.needs["features"], step.needs["base"], step.needs["select"])

    def _forward_of(self, features: str, base: str, select: str) -> int:
        """FLOPs of a pass of one sample through the graft; edits that a checkpoint carries are not counted."""
        rootstock = self._rootstock(features, self._told(base, params.BaseParams))
        chosen = self._told(select, params.SelectParams)
        if chosen.depth != rootstock.model.depth:
            raise KeyError(select)
        # Where evidence chooses, any of the candidates will do: blocks are all of one shape.
        numbers = [None if rule.layers is None else rule.layers.number(chosen.depth) for rule in chosen.rules]
        made = [edit for rule, number in zip(chosen.rules, numbers, strict=True) for edit in rule.edits[:number]]
        return graft_cost(rootstock.cost, made, rootstock.place).graft.flops

    def _of(self, step: StepInputs) -> Rootstock:
        return self._rootstock(step.needs["features"], self._told(step.needs["base"], params.BaseParams))

    def _rootstock(self, features: str, base: params.BaseParams) -> Rootstock:
        told = self._told(features, params.FeaturesParams)
        side = told.data.image_size // told.codec.factor // base.model.patch
        place = Place(width=base.model.width, heads=base.model.heads, num_tokens=side**2)
        return Rootstock(base.model, place, told.codec.latent_channels(told.data))

    def _told(self, key: str, kind: type[T]) -> T:
        """The parameters of another step; raises KeyError where it is not of that kind."""
        found = self.known(key).params
        if not isinstance(found, kind):
            raise KeyError(key)
        return found
