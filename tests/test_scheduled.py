"""Any scheduler of diffusers as a sampler, held to exact solutions for Gaussian data, and to our own DDIM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.models.condition import ClassConditioner, Condition
from graftwork.models.numerics.streams import SampleNoise
from graftwork.models.objectives.gaussian import STEPS, Diffusion
from graftwork.models.sampling import sample
from graftwork.models.sampling import scheduled as adapter
from graftwork.models.sampling.scheduled import UnfitScheduler, exact_prediction, rehearse, scheduled
from graftwork.pipeline.planning import preflight
from graftwork.specs.reading.load import SpecError, load
from graftwork.specs.sampler import SCHEDULERS, DdimSampler, Prediction, SchedulerSampler
from tests.conftest import TINY

CPU = torch.device("cpu")
MEAN, SPREAD = 0.3, 0.25
SHAPE = (1, 4, 4)


def drawn(
    sampler: SchedulerSampler, prediction: Prediction, indices: range = range(3), bounded: bool = False
) -> Tensor:
    exact = exact_prediction(prediction, MEAN, SPREAD)
    return scheduled(
        exact, SampleNoise(0, indices, SHAPE, CPU), sampler=sampler, prediction=prediction, bounded=bounded
    )


def solved(prediction: Prediction) -> Tensor:
    """Where the ODE leads from the noise that `drawn` starts from: it keeps a sample's place in the distribution."""
    noise = SampleNoise(0, range(3), SHAPE, CPU)()
    if prediction == "velocity":
        return MEAN + SPREAD * noise
    kept = Diffusion().alpha_bar[-1].item()
    return MEAN + SPREAD * (noise - math.sqrt(kept) * MEAN) / math.sqrt(kept * SPREAD**2 + 1 - kept)


@pytest.mark.parametrize(
    ("name", "prediction"), [(name, prediction) for name, classes in SCHEDULERS.items() for prediction in classes]
)
def test_each_scheduler_that_is_named_samples_what_the_model_learnt(name: str, prediction: Prediction) -> None:
    sampler = SchedulerSampler(name=name, steps=12)
    evaluations = rehearse(sampler, prediction, bounded=False)
    if name != "pndm":  # which begins with evaluations of its own
        assert evaluations == sampler.evaluations()


def test_diffusers_ddim_is_ours() -> None:
    exact = exact_prediction("epsilon", MEAN, SPREAD)

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return exact(x, t)

    condition, noise = Condition(labels=torch.zeros(3, dtype=torch.long)), SampleNoise(0, range(3), SHAPE, CPU)
    given: dict[str, Any] = {"conditioner": ClassConditioner(1), "objective": Diffusion(), "bounded": False}
    ours = sample(network, condition, noise, sampler=DdimSampler(steps=STEPS, guidance=1), **given)
    theirs = drawn(SchedulerSampler(name="ddim", steps=STEPS), "epsilon")
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_dpmsolver_takes_the_steps_of_its_formula() -> None:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), with l = log(alpha / sigma) and h a step of l."""
    steps, kept, exact = 20, Diffusion().alpha_bar, exact_prediction("epsilon", MEAN, SPREAD)
    times = torch.linspace(0, STEPS - 1, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]
    alpha, sigma = kept[times].sqrt(), (1 - kept[times]).sqrt()
    x = SampleNoise(0, range(3), SHAPE, CPU)().double()
    before, last_h = None, 0.0
    for i, t in enumerate(times):
        clean = (x - sigma[i] * exact(x, t[None])) / alpha[i]
        if i == steps - 1:
            break  # to a noise of zero, in a step of first order
        h = (torch.log(alpha[i + 1] / sigma[i + 1]) - torch.log(alpha[i] / sigma[i])).item()
        d = clean if before is None else clean + (clean - before) / (2 * last_h / h)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d
        before, last_h = clean, h
    theirs = drawn(SchedulerSampler(name="dpmsolver++", steps=steps), "epsilon")
    torch.testing.assert_close(theirs.double(), clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "prediction"), [("heun", "velocity"), ("euler", "velocity"), ("unipc", "velocity")])
def test_more_steps_come_nearer_to_the_exact_solution(name: str, prediction: Prediction) -> None:
    few, many = (drawn(SchedulerSampler(name=name, steps=steps), prediction) for steps in (10, 80))
    exact = solved(prediction)
    assert (many - exact).abs().max() < 0.5 * (few - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    "sampler",
    [
        SchedulerSampler(name="ddpm", steps=10),
        SchedulerSampler(name="dpmsolver++", steps=10, options={"algorithm_type": "sde-dpmsolver++"}),
    ],
    ids=["ddpm", "sde-dpmsolver++"],
)
def test_noise_comes_from_the_samples_own_streams(sampler: SchedulerSampler) -> None:
    torch.manual_seed(1)
    whole = drawn(sampler, "epsilon")
    torch.manual_seed(2)
    parts = torch.cat([drawn(sampler, "epsilon", range(1)), drawn(sampler, "epsilon", range(1, 3))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, drawn(SchedulerSampler(name="ddim", steps=10), "epsilon"))


def test_a_scheduler_that_draws_from_the_global_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    class Careless(DDIMScheduler):  # type: ignore[misc]
        def step(self, output: Tensor, t: Any, x: Tensor) -> Any:
            return super().step(output, t, x + 1e-9 * torch.randn_like(x))

    monkeypatch.setattr(adapter, "new_scheduler", lambda *_: Careless())
    with pytest.raises(UnfitScheduler, match=r"sampler\.name: .*draws from torch's global generator"):
        rehearse(SchedulerSampler(name="ddim"), "epsilon", bounded=False)


@pytest.mark.parametrize(
    ("sampler", "prediction", "line"),
    [
        ({"name": "NoSuchScheduler"}, "epsilon", r"sampler\.name: got 'NoSuchScheduler'; accepted: a scheduler of the"),
        ({"name": "EDMEulerScheduler"}, "epsilon", r"models that predict the noise; EDMEulerScheduler samples N\(0.2"),
        ({"name": "DDIMScheduler"}, "velocity", r"sampler\.name: .* for models that predict a velocity; DDIMSch"),
        ({"name": "DDIMInverseScheduler"}, "epsilon", r"models that predict the noise; DDIMInverseScheduler samples"),
        ({"name": "unipc", "options": {"solver": 3}}, "epsilon", r"sampler\.options\.solver: got 3; .*solver_order"),
        ({"name": "unipc", "options": {"beta_end": 1.0}}, "epsilon", r"sampler\.options\.beta_end: .*model decides it"),
        ({"name": "unipc", "options": {"solver_type": "x"}}, "epsilon", r"sampler\.options: got {'solver_type': 'x'}"),
    ],
)
def test_a_scheduler_that_cannot_serve_is_refused_in_one_line(
    sampler: dict[str, Any], prediction: Prediction, line: str
) -> None:
    with pytest.raises(UnfitScheduler, match=line) as refused:
        rehearse(SchedulerSampler(**sampler), prediction, bounded=False)
    assert "\n" not in str(refused.value)


def test_pixels_are_clipped_where_the_scheduler_can() -> None:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)  # which makes estimates that are far out

    noise = SampleNoise(0, range(2), SHAPE, CPU)
    found = scheduled(predict, noise, sampler=SchedulerSampler(name="ddim"), prediction="epsilon", bounded=True)
    assert found.abs().max() <= 1


# -- a job


def sampler_of(text: str) -> list[str]:
    return [f"evaluate.sampler={text}"]


@pytest.mark.parametrize(
    ("sampler", "line"),
    [
        ("{kind: scheduler, name: dpm}", "evaluate.sampler.name: got 'dpm'; accepted: ddim, ddpm, deis"),
        ("{kind: scheduler, name: FlowMatchEulerDiscreteScheduler}", "evaluate.sampler.name: .*predict the noise"),
        (
            "{kind: ode}",
            "evaluate.sampler.kind: got 'ode'; accepted: ancestral, ddim, scheduler: a dit predicts the noise",
        ),
        ("{kind: ode, method: dopri5, steps: 9}", "evaluate.sampler.steps: got 9; accepted: none, or method euler"),
        ("{kind: ode, method: heun, rtol: 0.1}", "evaluate.sampler.rtol: got 0.1; accepted: none, or method dopri5"),
    ],
)
def test_a_spec_with_a_sampler_for_other_models_is_refused(sampler: str, line: str) -> None:
    with pytest.raises(SpecError, match=line):
        load(TINY, sampler_of(sampler))


def test_a_plan_tries_the_scheduler_before_anything_runs() -> None:
    job = load(TINY, sampler_of("{kind: scheduler, name: EDMEulerScheduler}"))
    with pytest.raises(SpecError, match=r"evaluate\.sampler\.name: got 'EDMEulerScheduler'"):
        preflight.check_files(job, ["evaluate/stage1"])
    assert preflight.check_files(job, ["finetune"]) == [], "nothing that is left to do samples"
    served = load(TINY, sampler_of("{kind: scheduler, name: dpmsolver++, options: {solver_order: 3}}"))
    assert preflight.check_files(served, ["evaluate/stage1"]) == []
