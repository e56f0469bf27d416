"""Operators: one conformance suite that every registered operator passes, then what only some of them promise.

An operator is covered as soon as it is registered, with its default settings; EXTRA adds others.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import sys
import types
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from graftwork.models.numerics import parts as cache
from graftwork.models.operators import REGISTRY, attention, build_operator, kernels, recognise
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.models.operators.hyena import Projections
from graftwork.models.operators.kernels import (
    CAUSAL_CONVOLUTION,
    FLASH_ATTENTION,
    STATE_SPACE_SCAN,
    Kernel,
    KernelUnavailable,
)
from graftwork.models.operators.mamba import scan
from graftwork.specs.operators import (
    NOWHERE,
    Accelerated,
    HyenaSE,
    HyenaX,
    HyenaY,
    Mamba2,
    Mha,
    Mlp,
    MlpHyenaX,
    NoOperator,
    Operator,
    OperatorSpec,
    Place,
    Swa,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXTRA = [
    Swa(window=1),
    HyenaSE(kernel=2),
    HyenaX(kernel=7),
    HyenaY(kernel=1),
    Mamba2(d_state=3, d_conv=2, expand=1, headdim=4),
    Mlp(ratio=1.3),
    MlpHyenaX(ratio=1, kernel=9),
]
SPECS = [kind() for kind in REGISTRY] + EXTRA  # type: ignore[call-arg]
QUADRATIC = {Mha}  # in the number of tokens
SMALL = Place(width=16, heads=2, num_tokens=20)
WIDE = Place(width=48, heads=3, num_tokens=20)  # heads wide enough for FlexAttention


def label(value: Any) -> str | None:
    """A test's name for a spec: its kind, and what is not as by default."""
    if not isinstance(value, OperatorSpec):
        return None
    return "-".join([value.kind, *(f"{k}={v}" for k, v in value.model_dump(exclude_defaults=True).items())])


every_operator = pytest.mark.parametrize("spec", SPECS, ids=label)
with_tensors = [spec for spec in SPECS if spec.num_parameters(SMALL)]


def build(spec: OperatorSpec, place: Place = SMALL, dtype: torch.dtype = torch.float64) -> Any:
    """An operator all of whose parameters are random: nothing is hidden behind a zero."""
    operator = build_operator(spec, place)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in operator.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=draws))
    return operator.to(dtype)


def tokens(place: Place = SMALL, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, place.num_tokens, place.width, dtype=dtype)


def shapes_of(spec: OperatorSpec, place: Place) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        operator = build_operator(spec, place)
    return {name: tuple(value.shape) for name, value in operator.state_dict().items()}


def counted_flops(spec: OperatorSpec, place: Place) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build_operator(spec, place)(torch.zeros(1, place.num_tokens, place.width))
    return counter.get_total_flops()


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative, by the norm; of zeros, absolute."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm()) / (float(exact.norm()) or 1.0)


def squares(y: Tensor, x: Tensor) -> Tensor:
    """Return the sum of squares of an output, whose gradient by the input is zeros if it does not depend on it."""
    return y.square().sum() + 0 * x.sum()


# -- what every operator promises


def test_every_operator_that_a_spec_may_name_is_registered() -> None:
    assert set(REGISTRY) == set(get_args(get_args(Operator)[0]))


@every_operator
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_tokens_go_in_and_come_out_in_one_shape(spec: OperatorSpec, num_tokens: int) -> None:
    place = Place(16, 2, num_tokens)
    x = tokens(place, batch=3)
    y = build(spec, place)(x)
    assert y.shape == x.shape and y.isfinite().all()


@every_operator
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
def test_in_less_precision_the_answer_is_the_same_to_rounding(
    spec: OperatorSpec, dtype: torch.dtype, close: float
) -> None:
    operator, x = build(spec, dtype=dtype), tokens(dtype=dtype)
    y = operator(x)
    assert y.dtype == dtype
    assert distance(y, operator.double()(x.double())) < close


@every_operator
def test_gradients_are_those_of_finite_differences(spec: OperatorSpec) -> None:
    place = Place(width=8, heads=2, num_tokens=5)
    operator = build(spec, place)
    weights = dict(operator.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(operator, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (tokens(place).requires_grad_(), *weights.values()), fast_mode=True)


@every_operator
def test_gradients_reach_the_input_and_every_weight(spec: OperatorSpec) -> None:
    operator, x = build(spec), tokens().requires_grad_()
    squares(operator(x), x).backward()
    reached = {name: value.grad is not None and bool(value.grad.any()) for name, value in operator.named_parameters()}
    assert all(reached.values()), reached
    assert x.grad is not None
    assert x.grad.ne(0).any(-1).all() if spec.reach() != NOWHERE else not x.grad.any()


@every_operator
def test_an_output_depends_on_just_the_tokens_it_is_said_to_reach(spec: OperatorSpec) -> None:
    operator, x, num_tokens = build(spec), tokens(batch=1), SMALL.num_tokens
    nudges = torch.eye(num_tokens, dtype=torch.float64)[:, :, None]  # one token a sample
    changed = (operator(x + nudges) - operator(x)).abs().amax(-1) > 1e-12  # (token nudged, output)
    reach = spec.reach()
    before = num_tokens if reach.before is None else reach.before
    after = num_tokens if reach.after is None else reach.after
    expected = [[i - before <= nudged <= i + after for i in range(num_tokens)] for nudged in range(num_tokens)]
    assert changed.tolist() == expected


@every_operator
@pytest.mark.parametrize("sizes", [(1,) * 7, (1, 2, 4), (6, 1)], ids=str)
def test_a_sample_is_not_changed_by_those_beside_it(spec: OperatorSpec, sizes: tuple[int, ...]) -> None:
    operator, x = build(spec), tokens(batch=7)
    apart = torch.cat([operator(part) for part in x.split(sizes)])
    torch.testing.assert_close(apart, operator(x), rtol=1e-12, atol=1e-12)


every_kind = pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind().kind)


@every_kind  # other settings are other sizes of the same graph
def test_compiled_as_one_graph_it_gives_the_same_numbers_and_gradients(kind: Any) -> None:
    # Without code generation, which takes seconds for each graph; below it is done once for every operator, forward.
    operator, x = build(kind()), tokens().requires_grad_()
    torch._dynamo.reset()
    y, expected = torch.compile(operator, fullgraph=True, backend="aot_eager")(x), operator(x)
    torch.testing.assert_close(y, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(squares(out, x), x) for out in (y, expected))
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="Inductor writes vector code there, too"
)
@every_kind
def test_compiled_to_machine_code_it_gives_the_same_numbers(kind: Any) -> None:
    operator, x = build(kind(), dtype=torch.float32), tokens(dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(operator, fullgraph=True)(x)
        torch.testing.assert_close(found, operator(x), rtol=1e-4, atol=1e-4)


@every_operator
def test_a_copy_filled_from_the_state_dict_answers_alike(spec: OperatorSpec) -> None:
    operator, x = build(spec), tokens()
    copy = build_operator(spec, SMALL).double()
    assert torch.equal(copy(x), operator(x)) == (spec not in with_tensors)
    copy.load_state_dict(operator.state_dict())
    assert torch.equal(copy(x), operator(x))


@every_operator
@pytest.mark.parametrize("place", [SMALL, Place(48, 3, 7), Place(1152, 16, 256)], ids=["small", "odd", "xl2"])
def test_it_has_as_many_parameters_as_its_formula_says(spec: OperatorSpec, place: Place) -> None:
    with torch.device("meta"):
        counted = sum(value.numel() for value in build_operator(spec, place).parameters())
    assert spec.num_parameters(place) == counted


@every_operator
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 256])
def test_it_costs_the_flops_that_its_formula_says(spec: OperatorSpec, num_tokens: int) -> None:
    place = Place(48, 3, num_tokens)
    assert spec.flops(place) == counted_flops(spec, place)


@every_operator
def test_the_cost_grows_as_the_tokens_do(spec: OperatorSpec) -> None:
    few, many = (counted_flops(spec, Place(16, 2, num_tokens)) for num_tokens in (256, 4096))
    assert (many == 16 * few) == (type(spec) not in QUADRATIC), many / few


@pytest.mark.parametrize(
    ("spec", "place"),
    [(s, p) for s in with_tensors for p in (SMALL, Place(4, 2, 9), Place(1152, 16, 256)) if s.misfit(p) is None],
    ids=lambda value: label(value) or f"width={value.width}",
)
def test_an_operator_is_recognised_by_the_shapes_of_its_tensors(spec: OperatorSpec, place: Place) -> None:
    shapes = shapes_of(spec, place)
    for target in spec.targets:
        found = recognise(shapes, target, place)
        assert type(found) is type(spec) and shapes_of(found, place) == shapes


@pytest.mark.parametrize("target", ["mha", "mlp"])
def test_no_tensors_are_recognised_as_no_operator(target: Any) -> None:
    """Whether one was dropped, or its tensors are missing, they do not tell."""
    assert shapes_of(NoOperator(), SMALL) == {}
    assert recognise({}, target, SMALL) is None


@pytest.mark.parametrize("spec", with_tensors, ids=label)
def test_other_tensors_are_not_recognised_as_it(spec: OperatorSpec) -> None:
    shapes, (target,) = shapes_of(spec, SMALL), spec.targets
    name, shape = next(iter(shapes.items()))
    assert recognise(shapes | {"unknown": (1,)}, target, SMALL) is None
    assert recognise({other: value for other, value in shapes.items() if other != name}, target, SMALL) is None
    assert recognise(shapes | {name: (*shape, 1)}, target, SMALL) is None
    assert recognise(shapes | {name: (shape[0] + 1, *shape[1:])}, target, SMALL) is None
    assert recognise(shapes, "mlp" if target == "mha" else "mha", SMALL) is None


# -- names, settings and beginnings


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def filters(name: str, channels: int, taps: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels, 1, taps), f"{name}.bias": (channels,)}


PUBLISHED: list[tuple[OperatorSpec, dict[str, tuple[int, ...]]]] = [
    (Mha(), linear("qkv", 1152, 3456) | linear("proj", 1152, 1152)),
    (Swa(), linear("Wqkv", 1152, 3456) | linear("out_proj", 1152, 1152)),
    (
        HyenaSE(),
        linear("in_proj", 1152, 3456)
        | filters("short_filter", 3456, 4)
        | filters("inner_filter", 1152, 4)
        | linear("out_proj", 1152, 1152),
    ),
    (HyenaX(), linear("in_proj", 1152, 3456) | filters("short_filter", 3456, 4) | linear("out_proj", 1152, 1152)),
    (HyenaY(), linear("in_proj", 1152, 3456) | filters("inner_filter", 1152, 4) | linear("out_proj", 1152, 1152)),
    (
        Mamba2(),
        {"in_proj.weight": (4880, 1152)}  # z and x of 2304, B and C of 64, dt of 144
        | filters("conv1d", 2432, 4)
        | {"dt_bias": (144,), "A_log": (144,), "D": (144,), "norm.weight": (2304,), "out_proj.weight": (1152, 2304)},
    ),
    (Mlp(ratio=3), linear("fc1", 1152, 3456) | linear("fc2", 3456, 1152)),
    (Mlp(ratio=4), linear("fc1", 1152, 4608) | linear("fc2", 4608, 1152)),
    (Mlp(ratio=6), linear("fc1", 1152, 6912) | linear("fc2", 6912, 1152)),
    (
        MlpHyenaX(),
        linear("in_proj", 1152, 6912) | filters("short_filter", 256, 4) | linear("out_proj", 2304, 1152),
    ),
]


@pytest.mark.parametrize(("spec", "shapes"), PUBLISHED, ids=label)
def test_an_operator_has_the_published_tensors(spec: OperatorSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    assert shapes_of(spec, Place(1152, 16, 256)) == shapes


@pytest.mark.parametrize(("spec", "shapes"), PUBLISHED, ids=label)
def test_published_settings_are_read_off_the_shapes(spec: OperatorSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    (target,) = spec.targets
    assert recognise(shapes, target, Place(1152, 16, 256)) == spec


@pytest.mark.parametrize(
    "spec",
    [
        HyenaSE(kernel=7),
        HyenaX(kernel=1),
        HyenaY(kernel=3),
        Mamba2(d_state=5, d_conv=3, expand=3, headdim=6),
        MlpHyenaX(ratio=5, kernel=2),
    ],
    ids=label,
)
def test_settings_of_any_value_are_read_off_the_shapes(spec: OperatorSpec) -> None:
    (target,) = spec.targets
    assert recognise(shapes_of(spec, SMALL), target, SMALL) == spec


@pytest.mark.parametrize("width", [16, 1152])
def test_an_expansion_ratio_read_off_the_shapes_gives_the_same_hidden_width(width: int) -> None:
    place = Place(width, 2, 4)
    for hidden in {1, 2, width - 1, width + 1, 1234, 3 * width + 1, 7 * width - 1, 64 * width} & {
        *range(64 * width + 1)
    }:
        found = recognise(linear("fc1", width, hidden) | linear("fc2", hidden, width), "mlp", place)
        assert isinstance(found, Mlp) and found.hidden(place) == hidden


def test_an_operator_is_recognised_where_mamba_by_default_could_not_stand() -> None:
    narrow = Place(width=4, heads=2, num_tokens=9)
    assert Mamba2().misfit(narrow) is not None
    assert recognise(shapes_of(Mamba2(headdim=4), narrow), "mha", narrow) == Mamba2(headdim=4)


def test_tensors_whose_settings_no_spec_takes_are_not_recognised() -> None:
    too_wide = 65 * 16
    with pytest.raises(ValidationError):
        Mlp(ratio=65)
    assert recognise(linear("fc1", 16, too_wide) | linear("fc2", too_wide, 16), "mlp", SMALL) is None


def test_heads_that_do_not_divide_the_width_are_not_recognised() -> None:
    split = Mamba2(expand=1, headdim=3)  # 5 heads of a width of 16
    assert split.misfit(SMALL) is not None
    assert recognise(shapes_of(split, SMALL), "mha", SMALL) is None


@pytest.mark.parametrize("spec", [HyenaSE(), HyenaY()], ids=label)
def test_the_inner_filter_starts_as_the_identity(spec: OperatorSpec) -> None:
    taps: Any = build_operator(spec, SMALL).inner_filter
    assert torch.equal(taps.weight[:, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(16, 4)) and not taps.bias.any()


def test_mamba_starts_with_the_published_time_steps_and_decays() -> None:
    operator: Any = build_operator(Mamba2(headdim=1), Place(2000, 8, 4))  # 4000 heads
    step, rate = F.softplus(operator.dt_bias.double()), operator.A_log.double().exp()
    assert 0.999e-3 < step.min() < 1.01e-3 and 0.099 < step.max() < 0.1001
    assert step.log().mean().item() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.1)
    assert 0.999 < rate.min() < 1.1 and 15.9 < rate.max() < 16.001 and rate.mean().item() == pytest.approx(8.5, abs=0.3)
    assert operator.D.eq(1).all() and operator.norm.weight.eq(1).all()


# -- the definitions, against slow ones


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_no_operator_puts_out_zeros_whatever_goes_in(value: float) -> None:
    y = build(NoOperator())(torch.full((2, SMALL.num_tokens, SMALL.width), value, dtype=torch.float64))
    assert not y.any() and not y.requires_grad


def dense_attention(q: Tensor, k: Tensor, v: Tensor, before: int = -1, after: int = -1) -> Tensor:
    """(B,N,H,E) each, through an N x N matrix of scores, all but the band masked; -1 is no bound."""
    scores = torch.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(q.shape[-1])
    ahead = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None]
    far = ((before >= 0) & (-ahead > before)) | ((after >= 0) & (ahead > after))
    return torch.einsum("bhnm,bmhe->bnhe", scores.masked_fill(far, -math.inf).softmax(-1), v)


def dense(x: Tensor, qkv: nn.Linear, proj: nn.Linear, heads: int, window: int = -1) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (x @ qkv.weight.T + qkv.bias).chunk(3, dim=-1))
    return dense_attention(q, k, v, window, window).flatten(2) @ proj.weight.T + proj.bias


@pytest.mark.parametrize(("num_tokens", "window"), [(16, 4), (16, 1), (3, 4), (1, 4), (9, 8)])
def test_band_attention_is_dense_attention_with_all_but_the_band_masked(num_tokens: int, window: int) -> None:
    place = Place(16, 2, num_tokens)
    operator, x = build(Swa(window=window), place), tokens(place)
    torch.testing.assert_close(operator(x), dense(x, operator.Wqkv, operator.out_proj, 2, window))


def test_full_attention_is_dense_attention() -> None:
    operator, x = build(Mha()), tokens()
    torch.testing.assert_close(operator(x), dense(x, operator.qkv, operator.proj, 2))


class LargestTensor(TorchDispatchMode):
    """Watches the number of entries of all that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def test_band_attention_never_makes_a_matrix_of_tokens_by_tokens() -> None:
    place = Place(width=8, heads=1, num_tokens=4096)
    operator, x = build_operator(Swa(), place), torch.randn(1, 4096, 8)
    with LargestTensor() as largest:
        operator(x).sum().backward()
    assert 4096 * 8 * 9 <= largest.numel < 4096 * 4096 / 32


def convolved(sequence: list[Tensor], taps: nn.Conv1d | None) -> list[Tensor]:
    """(B,C) by (B,C), tap by tap."""
    if taps is None:
        return sequence
    assert taps.bias is not None
    kernel = taps.weight.shape[-1]
    return [
        taps.bias
        + sum(taps.weight[:, 0, kernel - 1 - back] * sequence[n - back] for back in range(kernel) if n >= back)
        for n in range(len(sequence))
    ]


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize(
    ("kind", "short", "inner"), [(HyenaSE, True, True), (HyenaX, True, False), (HyenaY, False, True)]
)
def test_a_hyena_is_its_definition_token_by_token(
    kind: Callable[..., OperatorSpec], short: bool, inner: bool, kernel: int
) -> None:
    operator, x = build(kind(kernel=kernel)), tokens()
    assert (operator.short_filter is not None, operator.inner_filter is not None) == (short, inner)
    qkv = [token @ operator.in_proj.weight.T + operator.in_proj.bias for token in x.unbind(1)]
    parts = [one.chunk(3, dim=-1) for one in convolved(qkv, operator.short_filter)]
    gated = convolved([k * v for _, k, v in parts], operator.inner_filter)
    y = torch.stack([q * inner for (q, _, _), inner in zip(parts, gated, strict=True)], dim=1)
    torch.testing.assert_close(operator(x), y @ operator.out_proj.weight.T + operator.out_proj.bias)


@pytest.mark.parametrize("part", [cache.PART, 1], ids=["whole", "in parts"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("length", "kernel"), [(9, 4), (9, 1), (2, 4)])
def test_the_convolutions_gradients_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, length: int, kernel: int, channels_last: bool, part: int
) -> None:
    monkeypatch.setattr(cache, "PART", part)
    torch.manual_seed(0)
    taps = CausalConv1d(5, kernel, HyenaY()).double()
    x = torch.randn(3, length, 5).double().transpose(1, 2)
    x = (x if channels_last else x.contiguous()).requires_grad_()
    expected = F.conv1d(F.pad(x, (kernel - 1, 0)), taps.weight, taps.bias, groups=5)
    found = taps(x)
    torch.testing.assert_close(found, expected)
    assert taps.bias is not None
    wanted, gradient = (x, taps.weight, taps.bias), torch.randn_like(x)
    pairs = (torch.autograd.grad(y, wanted, gradient) for y in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (found.stride(1) == 1) == channels_last  # what comes after it finds the layout that it had


def test_three_projections_are_the_parts_of_one_matrix() -> None:
    torch.manual_seed(0)
    three = Projections(8, 24)
    x = torch.randn(3, 5, 8, requires_grad=True)
    whole = F.linear(x, three.weight, three.bias).chunk(3, dim=-1)
    wanted, gradients = (x, three.weight, three.bias), [torch.randn_like(one) for one in whole]
    pairs = ([*y, *torch.autograd.grad(y, wanted, gradients)] for y in (three(x, apart=True), whole))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(three(x), F.linear(x, three.weight, three.bias))  # as any linear layer, unless asked


@pytest.mark.parametrize(("part", "sizes"), [(30, [5]), (29, [4, 1]), (12, [2, 2, 1]), (1, [1] * 5)], ids=str)
def test_what_is_too_much_for_the_cache_comes_in_parts(
    monkeypatch: pytest.MonkeyPatch, part: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(cache, "PART", part)
    one, other = torch.arange(30).view(5, 6), torch.arange(30, 60).view(5, 6)
    first, second = zip(*cache.in_parts(one, other), strict=True)
    assert [len(value) for value in first] == sizes
    assert torch.equal(torch.cat(first), one) and torch.equal(torch.cat(second), other)


def test_the_mlp_has_a_tanh_gelu_between_its_layers() -> None:
    operator, x = build(Mlp(ratio=1.5)), tokens()
    h = x @ operator.fc1.weight.T + operator.fc1.bias
    gelu = h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh()) / 2
    torch.testing.assert_close(operator(x), gelu @ operator.fc2.weight.T + operator.fc2.bias)


@pytest.mark.parametrize("kernel", [1, 4])
def test_the_hyena_of_channels_slides_each_tokens_own_taps_along_its_width(kernel: int) -> None:
    place = Place(width=4, heads=2, num_tokens=3)
    operator, x = build(MlpHyenaX(ratio=2, kernel=kernel), place), tokens(place)
    wide = x @ operator.in_proj.weight.T + operator.in_proj.bias  # (B,N,24)
    slid = torch.stack(convolved(list(wide.unbind(-1)), operator.short_filter), dim=-1)
    q, k, v = slid[..., :8], slid[..., 8:16], slid[..., 16:]
    torch.testing.assert_close(operator(x), (q * k * v) @ operator.out_proj.weight.T + operator.out_proj.bias)


def recurrence(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The state space, one token after another: x (B,N,H,P), dt (B,N,H), rate (H,), b and c (B,N,S) -> (B,N,H,P)."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])  # (B,H,P,S)
    outputs = []
    for n in range(x.shape[1]):
        decay = (dt[:, n] * rate).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bs->bhps", dt[:, n], x[:, n], b[:, n])
        outputs.append(torch.einsum("bhps,bs->bhp", state, c[:, n]))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("num_tokens", [1, 3, 63, 64, 65, 128, 150])
def test_mamba_is_its_recurrence_token_by_token(num_tokens: int) -> None:
    place = Place(width=8, heads=2, num_tokens=num_tokens)
    operator, x = build(Mamba2(d_state=6, headdim=4), place), tokens(place)
    z, xbc, dt = (x @ operator.in_proj.weight.T).split([16, 28, 4], dim=-1)
    xbc = torch.stack([one * one.sigmoid() for one in convolved(list(xbc.unbind(1)), operator.conv1d)], dim=1)
    u, b, c = xbc[..., :16].unflatten(-1, (4, 4)), xbc[..., 16:22], xbc[..., 22:]
    dt = (1 + (dt + operator.dt_bias).exp()).log()
    y = recurrence(u, dt, -operator.A_log.exp(), b, c) + operator.D[:, None] * u
    gated = y.flatten(2) * z * z.sigmoid()
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * operator.norm.weight
    torch.testing.assert_close(operator(x), normed @ operator.out_proj.weight.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_the_chunks_does_not_matter(chunk: int) -> None:
    x, dt = torch.randn(2, 50, 3, 4).double(), torch.rand(2, 50, 3).double()
    rate, b, c = -torch.rand(3).double(), torch.randn(2, 50, 5).double(), torch.randn(2, 50, 5).double()
    found = scan(x, dt, rate, b, c, chunk)
    torch.testing.assert_close(found, recurrence(x, dt, rate, b, c), rtol=1e-10, atol=1e-12)


def test_a_state_that_decays_at_once_has_finite_gradients() -> None:
    x, dt = torch.randn(1, 64, 2, 4, requires_grad=True), torch.full((1, 64, 2), 10.0, requires_grad=True)
    b, c, rate = torch.randn(1, 64, 3), torch.randn(1, 64, 3), torch.full((2,), -16.0, requires_grad=True)
    scan(x, dt, rate, b, c, 64).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in (x, dt, rate))


def test_in_bf16_the_decays_are_added_up_in_fp32() -> None:
    # In bf16 the log-decays of 40 tokens, log 2 each, would add up to within 1/16 only: 6% of what is left.
    x, b, c = torch.zeros(1, 64, 1, 4), torch.ones(1, 64, 1), torch.ones(1, 64, 1)
    x[:, 40] = 1
    dt, rate = torch.full((1, 64, 1), math.log(2)), torch.tensor([-1.0])
    found = scan(x.bfloat16(), dt, rate, b.bfloat16(), c.bfloat16(), 64)
    assert distance(found, recurrence(x, dt, rate, b, c)) < 1e-2
    operator, x = build(Mamba2(), dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    with unittest.mock.patch("graftwork.models.operators.mamba.scan", wraps=scan) as watched:
        operator(x)
    assert [watched.call_args.args[n].dtype for n in range(3)] == [torch.bfloat16, torch.float32, torch.float32]


# -- kernels: the decision, without a GPU


ACCELERATED = [kind for kind in REGISTRY if issubclass(kind, Accelerated)]
PACKAGES = {
    Mha: [FLASH_ATTENTION],
    Swa: [FLASH_ATTENTION],
    HyenaSE: [CAUSAL_CONVOLUTION],
    HyenaX: [CAUSAL_CONVOLUTION],
    HyenaY: [CAUSAL_CONVOLUTION],
    MlpHyenaX: [CAUSAL_CONVOLUTION],
    Mamba2: [CAUSAL_CONVOLUTION, STATE_SPACE_SCAN],
}
KERNELS = {kernel for needed in PACKAGES.values() for kernel in needed}
accelerated = pytest.mark.parametrize("kind", ACCELERATED, ids=lambda kind: kind().kind)


def fake_flash_attention(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """flash_attn_func's published interface: (B,N,H,E) each."""
    assert q.dtype in (torch.float16, torch.bfloat16) and all(part.stride(-1) == 1 for part in (q, k, v))
    return dense_attention(q.float(), k.float(), v.float(), *window_size).to(q.dtype)


def fake_causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """causal_conv1d_fn's published interface: x (B,C,L), weight (C,K), and the layouts that it takes."""
    assert x.dtype != torch.float64 and weight.dim() == 2 and 2 <= weight.shape[1] <= 4
    if x.stride(2) != 1:
        assert x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
    taps = weight.shape[1]
    y = F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=len(weight))
    return F.silu(y) if activation == "silu" else y


def fake_state_space_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    chunk_size: int,
    D: Tensor,  # noqa: N803
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """mamba_chunk_scan_combined's published interface: x (B,N,H,P), dt (B,N,H), b and c (B,N,1,S)."""
    assert dt_softplus and chunk_size == 256 and b.shape[2] == c.shape[2] == 1 and a.dtype == torch.float32
    dt = F.softplus(dt.float() + dt_bias.float())
    return (recurrence(x.float(), dt, a, b[:, :, 0].float(), c[:, :, 0].float()) + D[:, None] * x).to(x.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """As if on a GPU with every package installed: the kernels called, each replaced by its published interface."""
    called: list[Kernel] = []

    def offer(kernel: Kernel, function: Callable[..., Tensor]) -> None:
        def counting(*args: Any, **named: Any) -> Tensor:
            called.append(kernel)
            return function(*args, **named)

        parents = kernel.module.split(".")
        for end in range(1, len(parents) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parents[:end]), types.ModuleType(".".join(parents[:end])))
        setattr(sys.modules[kernel.module], kernel.function, counting)

    offer(FLASH_ATTENTION, fake_flash_attention)
    offer(CAUSAL_CONVOLUTION, fake_causal_convolution)
    offer(STATE_SPACE_SCAN, fake_state_space_scan)
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "generation", lambda device: (9, 0))
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "fused", None)
        monkeypatch.setattr(kernel, "failure", None)
    return called


def half_if_flash(kind: type[OperatorSpec]) -> torch.dtype:
    return torch.bfloat16 if PACKAGES[kind] == [FLASH_ATTENTION] else torch.float32


def test_every_accelerated_operator_has_its_kernels_tested() -> None:
    assert set(ACCELERATED) == set(PACKAGES)


@accelerated
@pytest.mark.parametrize("backend", ["auto", "kernel"])
@pytest.mark.parametrize("width", [16, 12])
def test_on_a_gpu_the_kernels_are_called_and_agree(kind: Any, backend: str, width: int, calls: list[Kernel]) -> None:
    place = Place(width, 2, 20)
    dtype = half_if_flash(kind)
    settings = {"headdim": 4} if kind is Mamba2 else {}
    operator, plain = (build(kind(backend=b, **settings), place, dtype) for b in (backend, "torch"))
    x = tokens(place, dtype=dtype)
    expected = plain(x)
    assert not calls
    assert distance(operator(x), expected) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert set(calls) == set(PACKAGES[kind])


@accelerated
def test_on_a_gpu_a_call_to_a_kernel_is_compiled_into_the_one_graph(kind: Any, calls: list[Kernel]) -> None:
    dtype = half_if_flash(kind)
    operator, x = build(kind(backend="kernel"), dtype=dtype), tokens(dtype=dtype)
    torch._dynamo.reset()
    y = torch.compile(operator, fullgraph=True, backend="eager")(x)
    assert calls and distance(y, operator(x)) < 1e-2


def test_what_the_compiler_calls_while_it_traces_takes_strings() -> None:
    """All that older versions of torch can hand to it."""
    functions = [one for one in vars(kernels).values() if getattr(one, "_dynamo_marked_constant", False)]
    assert len(functions) == 2
    for function in functions:
        taken = {kind for name, kind in function.__annotations__.items() if name != "return"}
        assert taken <= {"str", "str | None"}


@accelerated
def test_backend_torch_calls_no_kernel_even_on_a_gpu(kind: Any, calls: list[Kernel]) -> None:
    build(kind(backend="torch"))(tokens())
    build(kind(backend="torch"), dtype=torch.bfloat16)(tokens(dtype=torch.bfloat16))
    assert not calls


@accelerated
def test_by_itself_no_kernel_is_called_off_the_gpu(
    kind: Any, calls: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "on_gpu", lambda x: x.device.type == "cuda")
    build(kind(), dtype=torch.bfloat16)(tokens(dtype=torch.bfloat16))
    assert not calls


@accelerated
def test_flops_are_counted_of_the_definition_whatever_the_backend(kind: Any) -> None:
    assert counted_flops(kind(backend="kernel"), SMALL) == kind().flops(SMALL)


@accelerated
def test_a_kernel_asked_for_off_the_gpu_is_refused_in_one_line(kind: Any) -> None:
    with pytest.raises(KernelUnavailable) as caught:
        build(kind(backend="kernel"), dtype=torch.bfloat16)(tokens(dtype=torch.bfloat16))
    expected = f"{kind().kind}: `backend: kernel` needs {PACKAGES[kind][0].package}, but the tensors are on the cpu"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (Swa(), torch.float32, r"flash-attn, but it takes torch.float16 and torch.bfloat16, not torch.float32"),
        (HyenaX(kernel=5), torch.float32, r"causal-conv1d, but it takes 2 to 4 taps, not 5"),
        (HyenaY(kernel=1), torch.float32, r"causal-conv1d, but it takes 2 to 4 taps, not 1"),
        (MlpHyenaX(), torch.float64, r"causal-conv1d, but it takes .*, not torch.float64"),
    ],
    ids=label,
)
def test_what_a_kernel_does_not_take_goes_to_plain_pytorch_or_is_refused(
    spec: Accelerated, dtype: torch.dtype, reason: str, calls: list[Kernel]
) -> None:
    build(spec, dtype=dtype)(tokens(dtype=dtype))
    assert not calls
    with pytest.raises(KernelUnavailable, match=f"^{spec.kind}: .* needs {reason}$"):
        build(spec.model_copy(update={"backend": "kernel"}), dtype=dtype)(tokens(dtype=dtype))


def test_heads_too_wide_for_flash_attention_are_not_given_to_it(calls: list[Kernel]) -> None:
    place = Place(width=264, heads=1, num_tokens=4)
    x = tokens(place, dtype=torch.bfloat16)
    build(Mha(), place, torch.bfloat16)(x)
    with pytest.raises(KernelUnavailable, match="1 to 256 channels a head, not 264"):
        build(Mha(backend="kernel"), place, torch.bfloat16)(x)
    assert not calls


def test_a_gpu_too_old_for_a_kernel_is_named(calls: list[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "generation", lambda device: (7, 5))
    x = tokens(dtype=torch.bfloat16)
    build(Mha(), dtype=torch.bfloat16)(x)
    with pytest.raises(KernelUnavailable, match=r"compute capability \(8, 0\), this one has \(7, 5\)"):
        build(Mha(backend="kernel"), dtype=torch.bfloat16)(x)
    assert not calls


def test_a_gpu_on_which_a_kernel_computes_wrong_numbers_is_not_given_to_it(
    calls: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "generation", lambda device: (10, 3))
    x = tokens(dtype=torch.float32)
    build(HyenaX(), dtype=torch.float32)(x)
    assert not calls
    with pytest.raises(KernelUnavailable, match=r"wrong numbers on GPUs of compute capability \(10, 3\)$"):
        build(HyenaX(backend="kernel"), dtype=torch.float32)(x)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "there is no module causal_conv1d here"),  # what Python makes of None among its modules
        (types.ModuleType("causal_conv1d"), "its import fails: .*no attribute 'causal_conv1d_fn'"),
    ],
    ids=["absent", "another version"],
)
def test_a_package_that_cannot_be_imported_is_named_with_the_reason(
    found: Any, reason: str, calls: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", found)
    x = tokens(dtype=torch.float32)
    build(HyenaX(), dtype=torch.float32)(x)
    with pytest.raises(KernelUnavailable, match=f"^hyena_x: `backend: kernel` needs causal-conv1d, but {reason}$"):
        build(HyenaX(backend="kernel"), dtype=torch.float32)(x)
    assert not calls


@pytest.mark.parametrize("raised", ["RuntimeError('no tilelang')", "SystemError()", "KeyError('x')"])
def test_a_package_whose_import_raises_whatever_error_is_passed_over(
    raised: str, calls: list[Kernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    (tmp_path / "causal_conv1d.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    x = tokens(dtype=torch.float32)
    build(HyenaX(), dtype=torch.float32)(x)
    with pytest.raises(KernelUnavailable, match=r"causal-conv1d, but its import fails: (no tilelang|SystemError|'x')$"):
        build(HyenaX(backend="kernel"), dtype=torch.float32)(x)
    assert not calls


def test_the_scan_is_imported_though_its_package_cannot_be(
    calls: list[Kernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As mamba-ssm is without its compiled extension."""
    scan = sys.modules[STATE_SPACE_SCAN.module]
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda")
    (tmp_path / "mamba_ssm" / "sizes.py").write_text("CHUNK = 256")
    (folder / "ssd_combined.py").write_text(
        "from mamba_ssm.sizes import CHUNK\n"
        f"def {STATE_SPACE_SCAN.function}(*args, **named): return FAKE(*args, **named)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert kernels.import_failure(STATE_SPACE_SCAN) is None and STATE_SPACE_SCAN.fused is not None
    monkeypatch.setitem(STATE_SPACE_SCAN.fused.__globals__, "FAKE", getattr(scan, STATE_SPACE_SCAN.function))
    place = Place(16, 2, 20)
    build(Mamba2(backend="kernel", headdim=4), place, torch.float32)(tokens(place, dtype=torch.float32))
    assert STATE_SPACE_SCAN in calls
    with pytest.raises(ModuleNotFoundError, match="selective_scan_cuda"):  # who wants the package gets all of it
        importlib.import_module("mamba_ssm")


@pytest.mark.parametrize("compiled", [False, True])
def test_which_kernel_ran_and_why_a_faster_one_did_not_is_remembered(
    compiled: bool, calls: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DECISIONS", set())
    torch._dynamo.reset()
    for spec in (HyenaX(), HyenaY(kernel=1), Mha(backend="torch")):
        operator = build(spec, dtype=torch.float32)
        called = torch.compile(operator, fullgraph=True, backend="eager") if compiled else operator
        for _ in range(2):
            called(tokens(dtype=torch.float32))
    convolved = ("hyena_x", "causal-conv1d", None)
    not_convolved = ("hyena_y", "causal-conv1d", "it takes 2 to 4 taps, not 1")
    assert sorted(kernels.DECISIONS) == [convolved, not_convolved]


# -- FlexAttention, which a GPU without flash-attn gets


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler."), ImportError("no triton")])
def test_without_a_c_compiler_the_band_is_computed_as_defined(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, x, tried = build(Swa(window=4), WIDE, torch.float32), tokens(WIDE, dtype=torch.float32), []
    expected = operator(x)

    def fails(*args: Any, **named: Any) -> Tensor:
        tried.append(1)
        raise error

    for module in (attention, kernels):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: fails)
    monkeypatch.setattr(attention, "FLEX_FAILURES", [])
    monkeypatch.setattr(kernels, "DECISIONS", set())
    monkeypatch.setattr(kernels, "generation", lambda device: (9, 0))
    for _ in range(3):
        torch.testing.assert_close(operator(x), expected)
    assert len(tried) == 1
    assert ("swa", "FlexAttention", f"it cannot be compiled: {error}") in kernels.DECISIONS


def test_a_gpu_without_memory_is_not_taken_for_one_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: fails)
    with pytest.raises(torch.OutOfMemoryError):
        build(Swa(window=4), WIDE, torch.float32)(tokens(WIDE, dtype=torch.float32))
    assert not attention.FLEX_FAILURES


@pytest.mark.parametrize(("num_tokens", "window"), [(256, 4), (100, 2), (300, 130), (1024, 400), (257, 1000)])
def test_the_mask_of_the_band_holds_each_block_that_the_band_meets(num_tokens: int, window: int) -> None:
    mask = attention.band_mask(num_tokens, window, torch.device("cpu"))
    place = torch.arange(num_tokens)
    band = (place[:, None] - place[None]).abs() <= window
    tail = -num_tokens % attention.FLEX_BLOCK
    blocks = F.pad(band, (0, tail, 0, tail)).unflatten(0, (-1, attention.FLEX_BLOCK))
    met = blocks.unflatten(2, (-1, attention.FLEX_BLOCK)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), met)
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None]), band)


def test_the_mask_of_the_band_is_made_once_and_without_a_matrix_of_tokens_by_tokens() -> None:
    attention.band_mask.cache_clear()
    with LargestTensor() as largest:
        made = attention.band_mask(4096, 4, torch.device("cpu"))
    assert 0 < largest.numel < 4096
    assert attention.band_mask(4096, 4, torch.device("cpu")) is made


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("num_tokens", "window"), [(20, 4), (150, 2), (7, 9)])
def test_flex_attention_sees_what_the_band_does(num_tokens: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    place = Place(width=48, heads=3, num_tokens=num_tokens)
    operator, x = build(Swa(window=window), place, torch.float32), tokens(place, dtype=torch.float32)
    called: list[Any] = []

    def uncompiled(*args: Any, **named: Any) -> Any:
        called.append(named["block_mask"])
        return flex_attention(*args, **named)

    with torch.no_grad():
        expected = operator(x)
        monkeypatch.setattr(attention, "on_gpu", lambda x: True)
        monkeypatch.setattr(attention, "compiled_flex_attention", lambda: uncompiled)
        torch.testing.assert_close(operator(x), expected)
    assert called == [attention.band_mask(num_tokens, window, torch.device("cpu"))]


# -- kernels: their numbers, on a GPU


def on_a_gpu_with(*needed: Kernel) -> pytest.MarkDecorator:
    """Skip, saying which of the needs is not met."""
    reason = "needs a CUDA GPU; torch sees none"
    if torch.cuda.is_available():
        absent = [k.package for k in needed if importlib.util.find_spec(k.module.split(".", maxsplit=1)[0]) is None]
        reason = f"needs {' and '.join(absent)}, not installed" if absent else ""
    return pytest.mark.skipif(bool(reason), reason=reason or "runs")


def outputs_and_gradients(operator: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = operator(x)
    y.float().square().mean().backward() if y.dtype != torch.float64 else y.square().mean().backward()
    assert x.grad is not None
    gradients = {name: value.grad for name, value in operator.named_parameters() if value.grad is not None}
    return {"output": y.detach(), "input": x.grad} | gradients


GPU_CASES = [
    pytest.param(spec, dtype, marks=on_a_gpu_with(*PACKAGES[type(spec)]), id=f"{label(spec)}-{dtype}")
    for spec in [kind.model_validate({}) for kind in ACCELERATED]
    + [Swa(window=100), HyenaSE(kernel=2), Mamba2(headdim=64, d_state=16)]
    for dtype in (torch.bfloat16, torch.float32)
    if all(dtype in kernel.dtypes for kernel in PACKAGES[type(spec)])
]


def agrees_with_the_definition(spec: Accelerated, num_tokens: int, dtype: torch.dtype) -> None:
    """To within a few times the rounding of plain PyTorch in that precision, the truth being plain PyTorch in fp64."""
    place = Place(width=192, heads=4, num_tokens=num_tokens)
    operator, x = build_operator(spec, place).to("cuda", dtype), torch.randn(2, num_tokens, 192).to("cuda", dtype)
    plain, exact = (build_operator(spec.model_copy(update={"backend": "torch"}), place).cuda() for _ in range(2))
    plain.to(dtype).load_state_dict(operator.state_dict())
    exact.double().load_state_dict({name: value.double() for name, value in operator.state_dict().items()})
    found = outputs_and_gradients(operator, x)
    with pytest.MonkeyPatch.context() as patch:  # of swa too: FlexAttention would stand in for its definition
        patch.setattr(attention, "on_gpu", lambda _: False)
        rounded = outputs_and_gradients(plain, x)
    for name, truth in outputs_and_gradients(exact, x.double()).items():
        # Kernels multiply fp32 in TF32, to ten bits.
        assert distance(found[name], truth) < 4 * distance(rounded[name], truth) + 5e-3, name


@pytest.mark.parametrize(("spec", "dtype"), GPU_CASES)
@pytest.mark.parametrize("num_tokens", [256, 1024])
def test_a_kernel_computes_what_the_definition_does(spec: Accelerated, dtype: torch.dtype, num_tokens: int) -> None:
    agrees_with_the_definition(spec.model_copy(update={"backend": "kernel"}), num_tokens, dtype)


@on_a_gpu_with()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [256, 1000, 1024])
def test_compiled_flex_attention_computes_what_the_definition_does(num_tokens: int, dtype: torch.dtype) -> None:
    agrees_with_the_definition(Swa(backend="torch", window=100), num_tokens, dtype)
