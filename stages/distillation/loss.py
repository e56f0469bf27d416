"""Losses of distillation, and the errors that are reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from graftwork.models.numerics.parts import in_parts
from graftwork.specs.edits import Site
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.evidence import read_profile
from graftwork.stages.contract import Context
from graftwork.stages.distillation.activations import PASS_BATCH, Pairs
from graftwork.stages.distillation.sources import Source

Mimic = Callable[..., Tensor]  # a scion, as a function of what the operator saw
LossFunction = Callable[..., Tensor]
LOSSES: dict[str, LossFunction] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


def error(mimic: Mimic, pairs: Pairs, loss_of: LossFunction) -> Tensor:
    """The scion's mean error on the pairs, a scalar."""
    predicted = mimic(*pairs.inputs)
    if loss_of is F.l1_loss and pairs.weights is None:
        return MeanAbsolute.apply(predicted, pairs.outputs)
    each = loss_of(predicted.float(), pairs.outputs.float(), reduction="none")
    return (each if pairs.weights is None else each * pairs.weights).mean()


class MeanAbsolute(torch.autograd.Function):
    """The mean of |predicted - wanted| in fp32, as F.l1_loss, with its gradient to the bit. That is all signs: they are
    kept in the precision of the scion, and fewer passes over memory make them, which beside a small scion are much of a
    step's time."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, wanted: Tensor) -> Tensor:
        learning = ctx.needs_input_grad[0]
        signs = torch.empty_like(predicted) if learning else predicted
        total = torch.zeros((), device=predicted.device)
        for given, other, sign in in_parts(predicted, wanted, signs):
            difference = given.float() - other
            if learning:
                sign.copy_(difference).sign_()
            total += difference.abs_().sum()
        ctx.save_for_backward(signs)
        return total / predicted.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * (gradient / signs.numel()), None


@torch.no_grad()
def error_on(mimic: Mimic, source: Source, loss_of: LossFunction) -> float:
    """Mean error over all pairs."""
    errors = [error(mimic, pairs, loss_of).double() * len(pairs) for pairs in source.batches(PASS_BATCH)]
    return torch.stack(errors).sum().item() / len(source)


class RelativeError:
    """Squared error over the outputs' variance: 0 is a perfect mimic, 1 no better than their mean."""

    def __init__(self) -> None:
        self.wrong = self.total = self.squares = torch.zeros((), dtype=torch.float64)
        self.count = 0  # of tokens

    def add(self, answers: Tensor, outputs: Tensor) -> None:
        """Add what a mimic answers, and what the operator put out (B,N,D)."""
        for given, put_out in in_parts(answers, outputs):
            predicted, wanted = given.double(), put_out.double()
            self.wrong = self.wrong.to(wanted.device) + (predicted - wanted).square().sum()
            self.total = self.total.to(wanted.device) + wanted.sum((0, 1))
            self.squares = self.squares.to(wanted.device) + wanted.square().sum()
            self.count += wanted.shape[0] * wanted.shape[1]

    def gather(self) -> None:
        """Add what the other workers of a group added; all of them must call it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        sums = [(self.wrong.cpu(), self.total.cpu(), self.squares.cpu(), self.count)] * dist.get_world_size()
        dist.all_gather_object(sums, sums[0])
        wrong, total, squares, counts = zip(*(one for one in sums if one[3]), strict=True)
        self.wrong, self.total, self.squares = sum(wrong), sum(total), sum(squares)
        self.count = sum(counts)

    def item(self) -> float:
        """Return the error of all that was added; this waits for the device.

        Of outputs that are all one: 0 for a perfect mimic, else infinity.
        """
        wrong, variance = self.wrong.item(), (self.squares - self.total.square().sum() / self.count).item()
        if variance > 0:
            return wrong / variance
        return 0.0 if wrong == 0 else math.inf


@torch.no_grad()
def relative_error(mimic: Mimic, source: Source) -> float:
    """Return the relative error over all pairs."""
    sums = RelativeError()
    for pairs in source.batches(PASS_BATCH):
        sums.add(mimic(*pairs.inputs), pairs.outputs)
    return sums.item()


def loss_for(recipe: DistillSpec, site: Site, context: Context) -> tuple[str, str]:
    """The loss to distil with, and why. `auto`: L1 where the outputs' tails are heavy, so that a few outliers do not
    decide what is learned, and L2 elsewhere (section 4.1 of the paper); a pair's output holds that of attention: L1.
    """
    if recipe.loss != "auto":
        return recipe.loss, "set in the spec"
    if site.target == "pair":
        return "l1", "a pair adds what its attention puts out"
    kurtosis = read_profile(context.input("profile")).excess_kurtosis(site)
    heavy = kurtosis > recipe.heavy_tails
    compared = "above" if heavy else "at most"
    return "l1" if heavy else "l2", f"the outputs' excess kurtosis is {kurtosis:.3g}, {compared} {recipe.heavy_tails:g}"
