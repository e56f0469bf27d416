"""What each operator takes, forward and back, beside the floor of its FLOPs.

    python -m benchmarks.operators [--json FILE] [--precision fp32] [--width 1152 --heads 16 --batch 64]

`ms a sample` is a forward pass and its gradients, `floor ms` three times the FLOPs of a forward pass over those of a
large matrix product in the same precision, `of peak` one over the other. On a CPU, on one thread, the operators with a
short convolution run a second time with PyTorch's own layers, as public code has them: `times faster` is the median
over rounds of that over ours. Both ways' gradients must agree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.command_line import parser
from graftwork.models.numerics.precision import computing
from graftwork.models.operators import build_operator
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.models.operators.hyena import Projections
from graftwork.specs.costs import operator_cost
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Mamba2, Mha, Mlp, MlpHyenaX, OperatorSpec, Place, Swa
from graftwork.specs.training import Precision

OPERATORS: tuple[OperatorSpec, ...] = (
    Mha(), Swa(), HyenaSE(), HyenaX(), HyenaY(), Mamba2(), Mlp(), MlpHyenaX(),
)  # fmt: skip
TRAINING = 3  # passes that a forward pass and its gradients come to
APART = {"fp32": 1e-4, "bf16": 0.02}  # that the two ways' gradients may be, over the largest


class PublicConvolution(nn.Module):
    """The same layer with PyTorch's own gradient."""

    def __init__(self, ours: CausalConv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.silu = ours.weight, ours.bias, ours.silu

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight.shape[2]
        y = F.conv1d(F.pad(x, (taps - 1, 0)), self.weight, self.bias, groups=x.shape[1])
        return F.silu(y) if self.silu else y


def one_product(ours: Projections) -> nn.Linear:
    made = nn.Linear(ours.in_features, ours.out_features)
    made.weight, made.bias = ours.weight, ours.bias
    return made


PUBLIC: dict[type[nn.Module], Callable[[Any], nn.Module]] = {CausalConv1d: PublicConvolution, Projections: one_product}


def with_public_layers(operator: nn.Module) -> nn.Module:
    """A copy, with PyTorch's layers where we have our own."""
    made = copy.deepcopy(operator)
    for name, child in operator.named_children():
        if type(child) in PUBLIC:
            setattr(made, name, PUBLIC[type(child)](child))
    return made


def pass_of(operator: nn.Module, x: Tensor, gradient: Tensor, precision: Precision) -> Callable[[], list[Tensor]]:
    """A forward pass and the gradients of everything, which it returns."""
    wanted = [x, *operator.parameters()]

    def work() -> list[Tensor]:
        with computing(precision, x.device):
            y = operator(x)
        return list(torch.autograd.grad(y, wanted, gradient.to(y.dtype)))

    return work


def measured(spec: OperatorSpec, options: argparse.Namespace, device: torch.device, peak: float) -> dict[str, Any]:
    place = Place(width=options.width, heads=options.heads, num_tokens=options.tokens)
    kept = options.precision
    torch.manual_seed(0)
    operator = build_operator(spec, place).to(device)
    x, gradient = torch.randn(2, options.batch, place.num_tokens, place.width, device=device, dtype=kept)
    x.requires_grad_()
    ways = {"ours": pass_of(operator, x, gradient, options.precision)}
    if device.type == "cpu" and any(isinstance(child, CausalConv1d) for child in operator.children()):
        ways["public"] = pass_of(with_public_layers(operator), x, gradient, options.precision)
    answers = {name: way() for name, way in ways.items()}
    seconds = report.in_turn({name: partial(report.timed, way, device) for name, way in ways.items()}, options.rounds)
    best, floor = min(seconds["ours"]) / options.batch, TRAINING * operator_cost(spec, place).flops / peak
    row = {"operator": spec.kind, "ms a sample": best * 1e3, "floor ms": floor * 1e3, "of peak": floor / best}
    if "public" in ways:
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*answers.values(), strict=True))
        assert apart < APART[options.precision], f"{spec.kind}: the gradients are {apart} apart"
        row |= {"times faster": report.ratio(seconds["public"], seconds["ours"]), "gradients apart": apart}
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    arguments.add_argument("--width", type=int, default=384)
    arguments.add_argument("--heads", type=int, default=6)
    arguments.add_argument("--tokens", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 8)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    device = report.fastest_device()
    peak = report.limits(device, options.precision).flops
    rows = [measured(spec, options, device, peak) for spec in OPERATORS]
    facts = {"precision": options.precision, "width": options.width, "tokens": options.tokens,
             "batch": options.batch, "peak, TFLOP/s": peak / 1e12}  # fmt: skip
    report.show("Operators, forward and back", rows, facts, options.json)


if __name__ == "__main__":
    main()
