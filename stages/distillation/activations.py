"""Activations: what operators of the teacher, the rootstock, saw and put out. They are in memory, never on a disk.

Sites share passes of the teacher. Where tasks made one for all of them together, each of some samples (`capture`), a
site puts its parts together. Else the first site of a task has its pass capture those after it too, as many as fit the
memory, and a site's activations go when the site is through. Those of a site that does not fit by itself are kept on
the host, or else computed anew in each epoch, chunk by chunk of its order (`sources.choose_source`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.models.numerics.precision import computing
from graftwork.models.rootstocks import Rootstock
from graftwork.models.surgery import Observation, observe, observing
from graftwork.specs.costs import learns
from graftwork.specs.edits import Edit, Site, overlapping
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.hybrids import load_model
from graftwork.stages.artifacts.latents import Noised, NoisedAnew, noised, read, require_enough
from graftwork.stages.catalog.distill import DistillParams
from graftwork.stages.contract import Input, Portion, Stopped, never

PASS_BATCH = 64  # samples that pass through the teacher together


@dataclass(frozen=True)
class Pairs:
    """What an operator saw and put out, and the weight of its error."""

    inputs: tuple[Tensor, ...]  # each (n,..): an operator's tokens; a pair's tokens and condition
    outputs: Tensor  # (n,N,D)
    weights: Tensor | None  # (n,1,D), or all ones

    def __len__(self) -> int:
        return len(self.outputs)

    def tensors(self) -> list[Tensor]:
        return [*self.inputs, self.outputs, *([] if self.weights is None else [self.weights])]

    def of(self, tensors: Sequence[Tensor]) -> Pairs:
        """Others in the place of its tensors."""
        inputs = tuple(tensors[: len(self.inputs)])
        return Pairs(inputs, tensors[len(inputs)], None if self.weights is None else tensors[len(inputs) + 1])

    def split(self, size: int) -> Iterator[Pairs]:
        """Views of `size` samples each."""
        return map(self.of, zip(*(value.split(size) for value in self.tensors()), strict=True))

    def __reduce__(self) -> tuple[Callable[..., Pairs], tuple[Any, ...]]:
        """As arrays, which Ray hands from process to process without a copy; they are read-only there."""
        values = [(value.dtype, value.cpu().view(torch.uint8).numpy()) for value in self.tensors()]
        return _unpickled, (len(self.inputs), self.weights is not None, values)


def _unpickled(inputs: int, weighted: bool, values: Sequence[tuple[torch.dtype, NDArray[Any]]]) -> Pairs:
    with warnings.catch_warnings(action="ignore"):  # of their being read-only
        tensors = [torch.from_numpy(value).view(dtype) for dtype, value in values]
    return Pairs(tuple(tensors[:inputs]), tensors[inputs], tensors[inputs + 1] if weighted else None)


def joined(parts: Sequence[Pairs | None]) -> Pairs:
    """The pairs of all parts that have any, in their order, as tensors of their own."""
    pairs = [part for part in parts if part is not None]
    return pairs[0].of([torch.cat(values) for values in zip(*(part.tensors() for part in pairs), strict=True)])


@dataclass(frozen=True)
class Teacher:
    """The rootstock, and the noised latents that it is run on: the same ones for every site."""

    model: Rootstock
    carried: tuple[Edit, ...]
    train: Noised | NoisedAnew  # to train scions on
    heldout: Noised | NoisedAnew
    recipe: DistillSpec
    device: torch.device
    stopping: Callable[[], bool] = never

    @property
    def num_samples(self) -> int:
        """Noised latents, to train on and held-out."""
        return len(self.train) + len(self.heldout)

    def require_free(self, edit: Edit) -> None:
        """Raise ValueError if a parallel block of the rootstock's own has one of the edit's blocks."""
        if overlapping(self.carried, [edit]):
            raise ValueError(f"{edit.site}: one of its blocks is in a parallel block of the rootstock already")

    def trains(self, edit: Edit) -> bool:
        """Return whether an edit's scion learns from the teacher; else it is only measured."""
        return learns(edit, self.model.config.place)

    def bytes_a_sample(self, site: Site) -> int:
        """Return the bytes that one sample's pair at a site takes."""
        place = self.model.config.place
        return 2 * place.num_tokens * place.width * stored_type(site, self.recipe).itemsize

    def capture(self, sites: Sequence[Site], latents: Noised | NoisedAnew, place: torch.device) -> dict[Site, Pairs]:
        """Return what each site saw and put out in one pass, no further than the last site's block. Raises Stopped.

        place: the device, or the host, that holds the pairs.
        """
        pairs: dict[Site, Pairs] = {}
        for start in range(0, len(latents), PASS_BATCH):
            if self.stopping():
                raise Stopped(f"after {start} samples of the rootstock's pass")
            part = slice(start, start + PASS_BATCH)
            with computing(self.recipe.precision, self.device):
                noisy = latents[part].to(self.device)
                observations = observe(self.model, sites, noisy.z, noisy.t, noisy.condition)
            for site, observation in observations.items():
                batch = self.pairs(site, observation)
                if site not in pairs:
                    pairs[site] = batch.of([_empty(len(latents), value, place) for value in batch.tensors()])
                for whole, value in zip(pairs[site].tensors(), batch.tensors(), strict=True):
                    whole[part].copy_(value, non_blocking=True)
        if place != self.device:
            torch.cuda.synchronize()
        return pairs

    def streamed(self, sites: Sequence[Site], noisy: Noised) -> Iterator[tuple[Site, Pairs]]:
        """Yield what each site saw and put out as a pass of these samples leaves its block; none of it is kept."""
        here = noisy.to(self.device)
        observations = observing(self.model, sites, here.z, here.t, here.condition)
        while True:
            # Entered anew for each: who learns in between has an autocast of its own, see `distill.mimic_of`.
            with computing(self.recipe.precision, self.device):
                found = next(observations, None)
            if found is None:
                return
            yield found[0], self.pairs(*found)

    def pairs(self, site: Site, observation: Observation) -> Pairs:
        """Return what is learned from an observation."""
        dtype, gate = stored_type(site, self.recipe), observation.gate
        weights = gate.abs()[:, None] if self.recipe.gate_weighted and gate is not None else None
        return Pairs(tuple(value.to(dtype) for value in observation.inputs), observation.output.to(dtype), weights)


def read_teacher(
    params: DistillParams, inputs: Mapping[str, Input], device: torch.device, stopping: Callable[[], bool]
) -> Teacher:
    """Return the rootstock on a device, with the latents that every step of the recipe sees. Raises ValueError."""
    recipe, features = params.recipe, inputs["features"].path()
    model, carried = load_model(inputs, "base")
    objective = model.config.objective
    training, heldout = read(features, "training"), read(features, "heldout")
    require_enough("distill.samples", recipe.samples, len(training.x), "training")
    require_enough("distill.heldout", recipe.heldout or 0, len(heldout.x), "held-out")
    train, unseen = training.stratified(recipe.samples), heldout.stratified(recipe.num_heldout)
    learned: Noised | NoisedAnew
    measured: Noised | NoisedAnew
    if recipe.passes is None:
        learned = noised(train, objective, recipe.draws, params.seed, "distill")
        measured = noised(unseen, objective, 1, params.seed, "distill/heldout")
    else:
        learned = NoisedAnew(train, objective, params.seed, ("distill/passes",))
        measured = NoisedAnew(unseen, objective, params.seed, ("distill/heldout",))
    return Teacher(model.to(device), tuple(carried), learned, measured, recipe, device, stopping)


# Of a site: the pairs of some samples to train on, and of some held-out ones; None where a part has none of them.
Capture = tuple[Pairs | None, Pairs | None]


def capture(portion: Portion) -> list[Capture]:
    """Return what the sites of distillations see of a part of the samples. Raises Stopped."""
    steps: Sequence[DistillParams] = portion.steps
    teacher = read_teacher(steps[0], portion.inputs, portion.device, portion.stopping)
    sites = [step.edit.site for step in steps]

    def pairs_of(latents: Noised | NoisedAnew) -> dict[Site, Pairs]:
        share = latents[_share_of(len(latents), portion.share, portion.num_shares)]
        return teacher.capture(sites, share, portion.device)

    train, heldout = pairs_of(teacher.train), pairs_of(teacher.heldout)
    return [(train.get(site), heldout.get(site)) for site in sites]


def _share_of(count: int, share: int, num_shares: int) -> slice:
    """Return a share of whole batches, so that a sample passes with the same others whatever the number of shares."""
    batches = math.ceil(count / PASS_BATCH)
    begin, end = (PASS_BATCH * (batches * number // num_shares) for number in (share, share + 1))
    return slice(begin, min(end, count))


def _empty(count: int, like: Tensor, place: torch.device) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=place)


def stored_type(site: Site, recipe: DistillSpec) -> torch.dtype:
    """Return what a site's pairs are stored as.

    Operators begin with a product of matrices, which in bf16 sees no more of its input; a pair adds to its own.
    """
    return torch.bfloat16 if recipe.precision == "bf16" and site.target != "pair" else torch.float32
