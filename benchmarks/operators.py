"""What each operator takes, forward and back, beside PyTorch's attention and the floor of its FLOPs.

    python -m benchmarks.operators [--json FILE] [--precision fp32] [--width 1152 --heads 16 --tokens 1024 4096 16384]
    python -m benchmarks.operators --forward --width 1152 --heads 16 --tokens 1024 4096 16384 --operators mha hyena_x

`ms a sample` is a forward pass and its gradients, or with --forward a forward pass alone, as when samples are drawn;
`floor ms` the FLOPs of those over those of a large matrix product in the same precision, `of peak` one over the other.
The row `attention` is what diffusers runs: three products, and PyTorch's scaled_dot_product_attention; what can stand
in its place is so many `times as fast as attention`, the median over rounds. On a CPU all is on one thread, and the
operators with a short convolution run a second time with PyTorch's own layers, as public code has them: `times faster`
is the median over rounds of that over ours. What both ways compute, the outputs or the gradients, must agree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.command_line import parser
from graftwork.models.numerics.precision import computing
from graftwork.models.operators import build_operator
from graftwork.models.operators.attention import Attention, heads_first
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.models.operators.hyena import Projections
from graftwork.specs.costs import operator_cost
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Mamba2, Mha, Mlp, MlpHyenaX, OperatorSpec, Place, Swa
from graftwork.specs.training import Precision

OPERATORS: tuple[OperatorSpec, ...] = (
    Mha(), Swa(), HyenaSE(), HyenaX(), HyenaY(), Mamba2(), Mlp(), MlpHyenaX(),
)  # fmt: skip
TRAINING = 3  # passes that a forward pass and its gradients come to
APART = {"fp32": 1e-4, "bf16": 0.02}  # that the two ways' results may be, over the largest
BATCH_TOKENS = {"cuda": 16_384, "cpu": 2048}  # of all samples of a batch, if --batch does not say how many
ATTENTION, FASTER = "attention", "times as fast as attention"  # the way of it that diffusers has

Way = Callable[[], list[Tensor]]


class PublicConvolution(nn.Module):
    """The same layer with PyTorch's own gradient."""

    def __init__(self, ours: CausalConv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.silu = ours.weight, ours.bias, ours.silu

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight.shape[2]
        y = F.conv1d(F.pad(x, (taps - 1, 0)), self.weight, self.bias, groups=x.shape[1])
        return F.silu(y) if self.silu else y


class PublicAttention(nn.Module):
    """The same attention as diffusers runs it: a product each for queries, keys and values, and PyTorch's kernel."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = ours.heads, ours.qkv, ours.proj

    def forward(self, x: Tensor) -> Tensor:
        each = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)) for weight, bias in each)
        return self.proj(F.scaled_dot_product_attention(*heads_first(q, k, v)).transpose(1, 2).flatten(2))


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


def pass_of(operator: nn.Module, x: Tensor, gradient: Tensor, precision: Precision) -> Way:
    """A forward pass and the gradients of everything, which it returns."""
    wanted = [x, *operator.parameters()]

    def work() -> list[Tensor]:
        with computing(precision, x.device):
            y = operator(x)
        return list(torch.autograd.grad(y, wanted, gradient.to(y.dtype)))

    return work


def forward_of(operator: nn.Module, x: Tensor, precision: Precision) -> Way:
    """A forward pass, whose output it returns."""

    def work() -> list[Tensor]:
        with torch.no_grad(), computing(precision, x.device):
            return [operator(x)]

    return work


def measured(tokens: int, options: argparse.Namespace, device: torch.device, peak: float) -> list[dict[str, Any]]:
    """Return a row for attention as diffusers runs it, and one for each operator, all measured in turn."""
    place, precision = Place(width=options.width, heads=options.heads, num_tokens=tokens), options.precision
    batch = options.batch or max(1, BATCH_TOKENS[device.type] // tokens)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    specs = {spec.kind: spec for spec in OPERATORS if spec.kind in ("mha", *options.operators)}
    ours = {kind: build_operator(spec, place).to(device) for kind, spec in specs.items()}
    attention = ours["mha"]
    assert isinstance(attention, Attention)
    public = {"mha": PublicAttention(attention), **conv_twins(ours, device)}
    x, gradient = torch.randn(2, batch, tokens, place.width, device=device, dtype=dtype)
    x.requires_grad_()

    def way(operator: nn.Module) -> Way:
        return forward_of(operator, x, precision) if options.forward else pass_of(operator, x, gradient, precision)

    ways = {(kind, "ours"): way(operator) for kind, operator in ours.items()}
    ways |= {(kind, "public"): way(operator) for kind, operator in public.items()}
    apart = {kind: furthest(ways[kind, "ours"](), ways[kind, "public"]()) for kind in public}  # also to warm up
    for kind, difference in apart.items():
        assert difference < APART[precision], f"{kind}: the two ways are {difference} apart"
    works = {name: partial(report.timed, work, device) for name, work in ways.items()}
    seconds = report.in_turn(works, options.rounds)

    def row(kind: str, taken: Sequence[float]) -> dict[str, Any]:
        best, in_its_place = min(taken) / batch, "mha" in specs[kind].targets
        floor = (1 if options.forward else TRAINING) * operator_cost(specs[kind], place).flops / peak
        return {"tokens": tokens, "batch": batch, "ms a sample": best * 1e3, "floor ms": floor * 1e3,
                "of peak": floor / best,
                **({FASTER: report.ratio(seconds["mha", "public"], taken)} if in_its_place else {})}  # fmt: skip

    rows = [{"operator": ATTENTION, **row("mha", seconds["mha", "public"])}]
    for kind in specs:
        beside = {"results apart": apart[kind]} if kind in public else {}
        if kind in public and kind != "mha":
            beside["times faster"] = report.ratio(seconds[kind, "public"], seconds[kind, "ours"])
        rows.append({"operator": kind, **row(kind, seconds[kind, "ours"]), **beside})
    return rows


def conv_twins(operators: Mapping[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    """Return those with a short convolution, by PyTorch's own layers; none on a GPU, where those are what we run."""
    return {
        kind: with_public_layers(operator)
        for kind, operator in operators.items()
        if device.type == "cpu" and any(isinstance(child, CausalConv1d) for child in operator.children())
    }


def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest difference of any two tensors, over the largest number of the second."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    on_gpu = torch.cuda.is_available()
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16" if on_gpu else "fp32")
    made.add_argument("--width", type=int, default=384)
    made.add_argument("--heads", type=int, default=6)
    made.add_argument("--tokens", type=int, nargs="+", default=[256], help="one table for each")
    made.add_argument("--batch", type=int, help="samples; by default as many as come to the same number of tokens")
    made.add_argument("--forward", action="store_true", help="without gradients")
    kinds = [spec.kind for spec in OPERATORS]
    made.add_argument("--operators", nargs="+", choices=kinds, default=kinds, help="beside mha; by default all")
    made.add_argument("--rounds", type=int, default=7)
    return made


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(1)
    device = report.fastest_device()
    peak = report.limits(device, options.precision).flops
    rows = [row for tokens in options.tokens for row in measured(tokens, options, device, peak)]
    facts = {"precision": options.precision, "width, heads": f"{options.width}, {options.heads}",
             "rounds": options.rounds, "peak, TFLOP/s": peak / 1e12}  # fmt: skip
    title = "Operators, a forward pass" if options.forward else "Operators, forward and back"
    report.show(title, rows, facts, options.json)


if __name__ == "__main__":
    main()
