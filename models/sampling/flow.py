"""Samplers of flow models (SiT, arXiv 2401.08740): an ODE, or the SDE with the same marginals, from t = 0 to t = 1.

A velocity field is a function of x (B,C,..) and t (B,) that returns (B,C,..); its samples may be at different t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.objectives import Network, Objective, over
from graftwork.models.objectives.flow import velocity_in
from graftwork.models.sampling import register
from graftwork.specs.sampler import OdeSampler, SdeSampler

Field = Callable[[Tensor, Tensor], Tensor]

LAST_STEP = 0.04  # of t, at the end of the SDE, which is taken without noise

# Dormand and Prince's method of order 5 with an embedded one of order 4 (J. Comp. Appl. Math. 6, 1980, table 2). The
# last stage is the next step's first.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
FOURTH_ORDER = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
ERROR_WEIGHTS = tuple(high - low for high, low in zip((*STAGES[-1], 0.0), FOURTH_ORDER, strict=True))
ORDER = 5
# The next step is the one that would just pass, times a margin; see Hairer, Norsett and Wanner, section II.4.
MARGIN, MIN_GROWTH, MAX_GROWTH = 0.9, 0.2, 10.0
MIN_STEP = 1e-6  # of t: a shorter one is a field that this method cannot follow


@register("ode", "sde")
def draw(
    network: Network,
    condition: Condition,
    noise: Callable[[], Tensor],
    *,
    sampler: OdeSampler | SdeSampler,
    objective: Objective,
    bounded: bool,
) -> Tensor:
    """Return latents (B,C,..), from noise along a velocity; see `sampling.Draw`. Nothing is clamped."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return velocity_in(network(x, t, condition).float(), x)

    if not isinstance(sampler, OdeSampler):
        return euler_maruyama(field, noise(), noise, sampler.steps)
    if sampler.method == "dopri5":
        return dopri5(field, noise(), atol=sampler.atol, rtol=sampler.rtol)
    fixed = heun if sampler.method == "heun" else euler
    return fixed(field, noise(), sampler.steps)


class UnstableField(ArithmeticError):
    """A velocity field that an adaptive method cannot follow; the message is one line."""


def euler(field: Field, x: Tensor, steps: int) -> Tensor:
    """Return x at t = 1 after equal steps of Euler's method (order 1, one evaluation a step)."""
    for i in range(steps):
        x = x + field(x, _all_at(i / steps, x)) / steps
    return x


def heun(field: Field, x: Tensor, steps: int) -> Tensor:
    """Return x at t = 1 after equal steps of Heun's method (order 2, two evaluations a step)."""
    for i in range(steps):
        before = field(x, _all_at(i / steps, x))
        after = field(x + before / steps, _all_at((i + 1) / steps, x))
        x = x + (before + after) / (2 * steps)
    return x


def dopri5(field: Field, x: Tensor, *, atol: float, rtol: float) -> Tensor:
    """Return x at t = 1 by Dormand and Prince's method, with step sizes that keep to the tolerances.

    Each sample has a step size and an error of its own (root mean square over its elements of error / (atol + rtol
    |x|)), so that a sample does not depend on those beside it. The published code takes one error for a whole batch. A
    batch is evaluated until its last sample is done; those that are done stay where they are.

    Raises UnstableField if a sample's steps become too short, as they do if the field is not finite.
    """
    t = _all_at(0.0, x)
    slope = field(x, t)
    step = _first_step(field, x, slope, atol, rtol)
    while (open_ := t < 1).any():
        step = torch.where(open_, torch.minimum(step, 1 - t), torch.zeros_like(step))
        slopes = [slope]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            slopes.append(field(x + over(step, x) * _weighted(weights, slopes), t + node * step))
        moved = x + over(step, x) * _weighted(STAGES[-1], slopes)
        scale = atol + rtol * torch.maximum(x.abs(), moved.abs())
        error = _rms(over(step, x) * _weighted(ERROR_WEIGHTS, slopes) / scale)
        passed = open_ & (error <= 1)
        # A step that ends within rounding of 1 ends there.
        t = torch.where(passed, torch.where(step >= 1 - t, torch.ones_like(t), t + step), t)
        x = torch.where(over(passed, x), moved, x)
        slope = torch.where(over(passed, x), slopes[-1], slope)
        growth = (MARGIN * error.clamp(min=1e-10) ** (-1 / ORDER)).clamp(MIN_GROWTH, MAX_GROWTH)
        # After a refusal a step never grows; an error that is not a number shrinks it.
        growth = torch.where(passed, growth.clamp(min=1.0), growth.clamp(max=MARGIN)).nan_to_num(nan=MIN_GROWTH)
        step = step * growth
        _require_progress(step, t)
    return x


def euler_maruyama(field: Field, x: Tensor, draw: Callable[[], Tensor], steps: int) -> Tensor:
    """Return x at t = 1 by the SDE whose diffusion coefficient is the path's own noise level, w = sigma = 1 - t.

    dx = (v + w s) dt + sqrt(2 w) dW, as the published code has it, with the score s = (t v - x) / (1 - t). Of the
    steps all but one are equal; the last, of LAST_STEP, is its mean. `draw` yields unit Gaussian noise of x's shape.
    """
    size = (1 - LAST_STEP) / (steps - 1)
    for i in range(steps - 1):
        t = i * size
        x = x + size * _drift(field, x, t) + (2 * (1 - t) * size) ** 0.5 * draw()
    return x + LAST_STEP * _drift(field, x, 1 - LAST_STEP)


def _drift(field: Field, x: Tensor, t: float) -> Tensor:
    """Return v + w s. Since w = 1 - t, that is v + (t v - x), which divides by nothing."""
    velocity = field(x, _all_at(t, x))
    return velocity + (t * velocity - x)


def _first_step(field: Field, x: Tensor, slope: Tensor, atol: float, rtol: float) -> Tensor:
    """Return a step (B,) for each sample's start, from the field's size and its change (Hairer, II.4)."""
    scale = atol + rtol * x.abs()
    size, speed = _rms(x / scale), _rms(slope / scale)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-6), 0.01 * size / speed)
    change = _rms((field(x + over(trial, x) * slope, trial) - slope) / scale) / trial
    largest = torch.maximum(speed, change)
    step = torch.where(largest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / ORDER))
    return torch.minimum(100 * trial, step).nan_to_num(nan=0.0).clamp(min=MIN_STEP)


def _require_progress(step: Tensor, t: Tensor) -> None:
    stuck = (t < 1 - MIN_STEP) & (step < MIN_STEP)
    if stuck.any():
        place = t[stuck][0].item()
        raise UnstableField(
            f"dopri5: a step at t = {place:.4f} would be shorter than {MIN_STEP:g}: the model's velocity is not finite "
            "or changes too fast; accepted: method heun or euler, or a model that is trained"
        )


def _all_at(t: float, x: Tensor) -> Tensor:
    """Return t (B,) for samples that are all at one t."""
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    parts = (weight * slope for weight, slope in zip(weights, slopes, strict=False) if weight)
    return sum(parts, torch.zeros_like(slopes[0]))


def _rms(x: Tensor) -> Tensor:
    """Return the root mean square of each sample (B,), over its elements."""
    return x.flatten(1).square().mean(1).sqrt()
