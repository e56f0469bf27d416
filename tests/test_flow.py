"""Flow matching (SiT, arXiv 2401.08740): its path and loss, and samplers that are held to a field solved by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import SampleNoise
from graftwork.models.objectives.flow import LinearFlow
from graftwork.models.sampling import flow
from graftwork.models.sampling.flow import UnstableField, dopri5, euler, euler_maruyama, heun
from graftwork.specs.job import JobSpec
from graftwork.specs.sampler import AncestralSampler, OdeSampler, SdeSampler
from tests.conftest import TINY

CONDITION = Condition(labels=torch.tensor([0, 1, 2]))
CPU = torch.device("cpu")
MEAN, SPREAD = 0.4, 0.3  # of the data that the exact field below belongs to


def exact(x: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t = x] of data N(MEAN, SPREAD^2): x_t has variance (t SPREAD)^2 + (1 - t)^2 about t MEAN."""
    t = t[:, None]
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def solved(noise: Tensor) -> Tensor:
    """Where that field's ODE leads: it keeps a sample's place in the distribution."""
    return MEAN + SPREAD * noise


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def example() -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples, t and noise."""
    torch.manual_seed(0)
    return torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.3, 1.0]), torch.randn(3, 2, 4, 4)


# -- the objective


def test_a_path_leads_from_noise_to_data(example: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, noise = example
    noised = LinearFlow().noised(x, t, noise)
    assert torch.equal(noised[0], noise[0]) and torch.equal(noised[2], x[2])
    torch.testing.assert_close(noised[1], 0.3 * x[1] + 0.7 * noise[1])


def test_t_is_uniform_between_noise_and_data() -> None:
    t = LinearFlow().draw_t(10_000, torch.Generator().manual_seed(0))
    shares = torch.histc(t, bins=10, min=0, max=1) / len(t)
    assert t.min() >= 0 and t.max() < 1 and (shares - 0.1).abs().max() < 0.015


def test_the_loss_is_the_mean_square_error_of_the_velocity(example: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, noise = example
    given: list[Any] = []

    def network(*inputs: Any) -> Tensor:
        given.extend(inputs)
        return torch.cat([torch.full_like(x, 0.5), torch.full_like(x, 1e6)], dim=1)  # and a half that is left out

    loss = LinearFlow().loss(network, x, t, CONDITION, noise)
    for sample in range(3):
        error = sum(
            (0.5 - (a - b)) ** 2
            for a, b in zip(x[sample].flatten().tolist(), noise[sample].flatten().tolist(), strict=True)
        )
        assert loss[sample].item() == pytest.approx(error / 32, rel=1e-5)
    assert torch.equal(given[1], t), "t goes in as it is"
    assert given[2] is CONDITION


def test_an_output_points_to_the_clean_sample(example: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, noise = example
    torch.testing.assert_close(LinearFlow().x0(LinearFlow().noised(x, t, noise), t, x - noise), x)


def test_quarters_go_from_the_least_noise_to_the_most() -> None:
    t = torch.tensor([1.0, 0.76, 0.74, 0.26, 0.24, 0.0])
    assert LinearFlow().quarter(t).tolist() == [0, 0, 1, 2, 3, 3]


# -- the samplers


@pytest.mark.parametrize(("method", "order"), [(euler, 1), (heun, 2)])
def test_a_fixed_step_halves_its_error_by_its_order(method: Any, order: int, noise: Tensor) -> None:
    errors = [(method(exact, noise, steps) - solved(noise)).abs().max().item() for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("method", "evaluations"), [(euler, 1), (heun, 2)])
def test_a_step_takes_as_many_evaluations_as_it_says(method: Any, evaluations: int, noise: Tensor) -> None:
    times: list[float] = []
    method(lambda x, t: times.append(t[0].item()) or exact(x, t), noise, 5)  # type: ignore[func-returns-value]
    assert len(times) == 5 * evaluations and times[0] == 0 and max(times) == (0.8 if evaluations == 1 else 1.0)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7])
def test_dopri5_keeps_to_its_tolerance(rtol: float, noise: Tensor) -> None:
    assert (dopri5(exact, noise, atol=rtol / 1000, rtol=rtol) - solved(noise)).abs().max() < 10 * rtol


def test_dopri5_is_of_fifth_order(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    # Steps that may neither be refused nor change: the order of the tableau itself.
    monkeypatch.setattr(flow, "MARGIN", 1.0)
    monkeypatch.setattr(flow, "MIN_GROWTH", 1.0)
    monkeypatch.setattr(flow, "MAX_GROWTH", 1.0)
    errors = []
    for steps in (32, 64):
        monkeypatch.setattr(
            flow, "_first_step", lambda field, x, *_, steps=steps: torch.full((len(x),), 1 / steps, dtype=x.dtype)
        )
        errors.append((dopri5(exact, noise, atol=1e9, rtol=0) - solved(noise)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.5)


def test_dopri5_evaluates_less_where_less_is_asked(noise: Tensor) -> None:
    def evaluations(rtol: float) -> int:
        count = 0

        def field(x: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return exact(x, t)

        dopri5(field, noise, atol=rtol / 1000, rtol=rtol)
        return count

    assert evaluations(1e-3) < evaluations(1e-6) < 500


def test_a_sample_by_dopri5_does_not_depend_on_those_beside_it(noise: Tensor) -> None:
    noise = noise * torch.tensor([[0.1], [1.0], [3.0], [0.5]], dtype=noise.dtype)  # so that their steps differ
    whole = dopri5(exact, noise, atol=1e-6, rtol=1e-3)
    alone = torch.cat([dopri5(exact, row[None], atol=1e-6, rtol=1e-3) for row in noise])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize(
    "bad", [lambda x, t: x * float("nan"), lambda x, t: torch.where(t[:, None] < 0.5, x, x * 1e30)]
)
def test_a_field_that_dopri5_cannot_follow_is_refused(bad: Any, noise: Tensor) -> None:
    with pytest.raises(UnstableField, match=r"dopri5: a step at t = 0.*accepted: method heun or euler"):
        dopri5(bad, noise, atol=1e-6, rtol=1e-3)


def test_the_sde_samples_the_distribution() -> None:
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, 1, generator=draws, dtype=torch.float64)
    found = euler_maruyama(exact, start, lambda: torch.randn(start.shape, generator=draws, dtype=start.dtype), 250)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.std().item() == pytest.approx(SPREAD, rel=0.03)


def test_a_step_of_the_sde_is_that_of_its_formula() -> None:
    x, w = torch.tensor([[0.7]], dtype=torch.float64), iter([0.5, -1.1])
    found = euler_maruyama(exact, x, lambda: torch.full_like(x, next(w)), 3)
    expected, size = 0.7, 0.48
    for t, drawn, step in ((0.0, 0.5, size), (0.48, -1.1, size), (0.96, None, 0.04)):
        v = exact(torch.tensor([[expected]]), torch.tensor([t])).item()
        score = (t * v - expected) / (1 - t)
        noise = 0.0 if drawn is None else math.sqrt(2 * (1 - t) * step) * drawn
        expected += step * (v + (1 - t) * score) + noise
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert next(w, None) is None


def test_samples_of_the_sde_are_the_same_in_any_batch() -> None:
    def drawn(indices: list[int]) -> Tensor:
        noise = SampleNoise(0, indices, (6,), CPU)
        return euler_maruyama(exact, noise(), noise, 20)

    assert torch.equal(drawn([0, 1, 2]), torch.cat([drawn([0]), drawn([1, 2])]))


# -- a job


@pytest.mark.parametrize("evaluate", [None, {"samples": 40}, {"samples": 40, "sampler": {"kind": "sde"}}], ids=str)
def test_a_job_that_names_no_sampler_has_the_one_of_its_models_kind(evaluate: Any) -> None:
    document = yaml.safe_load(TINY.read_text()) | ({} if evaluate is None else {"evaluate": evaluate})
    if evaluate is None:
        del document["evaluate"]
    named = "sampler" in (evaluate or {})
    sit = JobSpec.model_validate(document | {"model": document["model"] | {"kind": "sit"}})
    assert sit.evaluate.sampler == (SdeSampler() if named else OdeSampler())
    assert sit.evaluate.samples == (evaluate or {"samples": 50_000})["samples"]
    if not named:
        assert JobSpec.model_validate(document).evaluate.sampler == AncestralSampler()
