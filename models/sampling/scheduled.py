"""Any scheduler of diffusers as a sampler: DPM-Solver++, UniPC, Heun, Euler and others, by name.

A scheduler is set up for what the network predicts: noise, on the chain that DiT was trained on (linear betas), or a
velocity, on the linear path. Its noise comes from the samples' own streams, so that a sample is the same in any batch.
Whether a scheduler can serve at all is not looked up but tried: `rehearse` samples a Gaussian whose exact noise and
velocity are known. Shapes: x (B,C,..), t (B,).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import SampleNoise
from graftwork.models.objectives import Network, Objective
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.sampling import register
from graftwork.specs.problems import LINE, shortened, shown
from graftwork.specs.sampler import PREDICTED, Prediction, SchedulerSampler

STEPS = 1000  # of the chain, and of diffusers' clock for flows, which reads 1000 times the noise level
# What the model decides, by the names of a scheduler's settings; those that a scheduler has not are left out.
SETTINGS: Mapping[Prediction, Mapping[str, Any]] = {
    "epsilon": {
        "num_train_timesteps": STEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    },
    "velocity": {"num_train_timesteps": STEPS, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}
MODELS_OWN = (  # settings that are no one's to choose
    *SETTINGS["epsilon"],
    "use_flow_sigmas",
    "trained_betas",
    "variance_type",
    "rescale_betas_zero_snr",
    "clip_sample",
    "clip_sample_range",
)
# The data of a rehearsal, and how far its samples may miss them.
MEAN, SPREAD = 0.2, 0.2
MEAN_TOLERANCE, SPREAD_TOLERANCE = 0.03, 0.05
REHEARSED_STEPS, REHEARSED_SIDE = 100, 48

Predict = Callable[[Tensor, Tensor], Tensor]


class UnfitScheduler(ValueError):
    """A scheduler that does not exist or cannot sample here. The message is one line and begins with `sampler`."""

    def __init__(self, field: tuple[str, ...], value: object, accepted: str) -> None:
        super().__init__(f"sampler.{'.'.join(field)}: got {shown(value)}; accepted: {accepted}")


@register("scheduler")
def draw(
    network: Network,
    condition: Condition,
    noise: Callable[[], Tensor],
    *,
    sampler: SchedulerSampler,
    objective: Objective,
    bounded: bool,
) -> Tensor:
    """Return latents (B,C,..) by a scheduler of diffusers; see `sampling.Draw`, and `scheduled` for errors."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output = network(x, t, condition).float()
        return output[:, : x.shape[1]]  # the second half is a variance, or of no meaning

    assert isinstance(noise, SampleNoise), "a scheduler draws from the samples' own streams"
    return scheduled(predict, noise, sampler=sampler, prediction=objective.kind, bounded=bounded)


@torch.no_grad()
def scheduled(
    predict: Predict, noise: SampleNoise, *, sampler: SchedulerSampler, prediction: Prediction, bounded: bool
) -> Tensor:
    """Return samples (B,C,..) of a network's `predict`, which returns the noise or the velocity at (x, t).

    bounded: samples lie in [-1, 1]; schedulers that can clip their estimates of them do.

    Raises UnfitScheduler for a scheduler or options that there are not, and RuntimeError if the scheduler drew from
    torch's global generator.
    """
    scheduler = new_scheduler(sampler, prediction, bounded)
    x = noise()
    before = _global_states(x.device)
    scheduler.set_timesteps(sampler.steps, device=x.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    own_noise = {"generator": noise.generators} if "generator" in _names(scheduler.step) else {}
    # Schedulers that count in noise levels begin at the highest of them; others have 1 here.
    x = x * float(scheduler.init_noise_sigma) if prediction == "epsilon" else x
    for i, moment in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, moment) if hasattr(scheduler, "scale_model_input") else x
        output = predict(scaled, _t(scheduler, i, prediction).to(x.device).expand(len(x)))
        # diffusers' flows lead from data to noise.
        output = -output if prediction == "velocity" else output
        x = scheduler.step(output, moment, x, **own_noise).prev_sample
    if not all(map(torch.equal, before, _global_states(x.device))):
        raise RuntimeError(f"{sampler.name}: draws from torch's global generator, which no sample may depend on")
    return x


def new_scheduler(sampler: SchedulerSampler, prediction: Prediction, bounded: bool) -> Any:
    """Return the scheduler, set up for the model, with no state. Raises UnfitScheduler."""
    from diffusers import SchedulerMixin, schedulers

    name = sampler.class_name(prediction)
    kind = getattr(schedulers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        raise UnfitScheduler(("name",), sampler.name, "a scheduler of the diffusers that is installed")
    known = list(inspect.signature(kind).parameters)
    for option, value in sampler.options.items():
        if option in MODELS_OWN:
            raise UnfitScheduler(("options", option), value, "none: the model decides it")
        if option not in known:
            free = [one for one in known if one not in MODELS_OWN]
            raise UnfitScheduler(("options", option), value, f"an option of {name}: {', '.join(free) or 'it has none'}")
    settings = {**SETTINGS[prediction], "clip_sample": bounded, "clip_sample_range": 1.0}
    settings = {name: value for name, value in settings.items() if name in known}
    try:
        return kind(**settings, **sampler.options)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise UnfitScheduler(*_given(sampler), f"what {name} takes: {_line(error)}") from error


def rehearse(sampler: SchedulerSampler, prediction: Prediction, bounded: bool) -> int:
    """Return how often the scheduler evaluates a network; raise UnfitScheduler unless it can serve.

    It has to sample a known Gaussian in REHEARSED_STEPS steps, and to get through the steps that are asked for.
    """
    name = sampler.class_name(prediction)
    samples, _ = _rehearsed(sampler.model_copy(update={"steps": REHEARSED_STEPS}), prediction, bounded)
    mean, spread = samples.mean().item(), samples.std().item()
    if not (abs(mean - MEAN) < MEAN_TOLERANCE and abs(spread - SPREAD) < SPREAD_TOLERANCE):
        wrong = f"{name} samples N({MEAN}, {SPREAD}^2) as N({mean:.2f}, {spread:.2f}^2)"
        raise UnfitScheduler(*_given(sampler), f"a scheduler for models that predict {PREDICTED[prediction]}; {wrong}")
    samples, evaluations = _rehearsed(sampler, prediction, bounded)
    if not samples.isfinite().all():
        raise UnfitScheduler(("steps",), sampler.steps, f"steps with which {name}'s samples are finite")
    return evaluations


def _rehearsed(sampler: SchedulerSampler, prediction: Prediction, bounded: bool) -> tuple[Tensor, int]:
    """Return samples of the known Gaussian, and how often its network was evaluated."""
    exact, evaluations = exact_prediction(prediction), 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return exact(x, t)

    noise = SampleNoise(0, range(2), (1, REHEARSED_SIDE, REHEARSED_SIDE), torch.device("cpu"))
    try:
        samples = scheduled(predict, noise, sampler=sampler, prediction=prediction, bounded=bounded)
    except UnfitScheduler:
        raise
    except Exception as error:  # whatever diffusers raises of a scheduler that is used as it was not meant to be
        wrong = f"{sampler.class_name(prediction)} fails: {_line(error)}"
        accepted = f"a scheduler for models that predict {PREDICTED[prediction]}; {wrong}"
        raise UnfitScheduler(*_given(sampler), accepted) from error
    return samples, evaluations


def exact_prediction(prediction: Prediction, mean: float = MEAN, spread: float = SPREAD) -> Predict:
    """Return what a perfect network predicts of data that are N(mean, spread^2) in each element."""
    kept = Diffusion().alpha_bar
    log_ratio = (kept / (1 - kept)).log()

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        # Between two steps of the chain the logarithm of the signal-to-noise ratio is a line.
        low = t.long().clamp(max=STEPS - 2)
        ratio = torch.lerp(log_ratio[low], log_ratio[low + 1], t.double() - low).sigmoid().to(x.dtype)
        a, b = (part.sqrt().reshape(-1, *[1] * (x.dim() - 1)) for part in (ratio, 1 - ratio))
        return b * (x - a * mean) / ((a * spread) ** 2 + b**2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return mean + (t * spread**2 - (1 - t)) / ((t * spread) ** 2 + (1 - t) ** 2) * (x - t * mean)

    return epsilon if prediction == "epsilon" else velocity


def _t(scheduler: Any, i: int, prediction: Prediction) -> Tensor:
    """Return what the network is told at the scheduler's evaluation `i`, ()."""
    if prediction == "epsilon":
        return scheduler.timesteps[i]
    # Not the timestep, which some schedulers round to an integer.
    return 1 - scheduler.sigmas[i].float()


def _global_states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _names(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _given(sampler: SchedulerSampler) -> tuple[tuple[str, ...], object]:
    """Return the field to blame, and its value: the options, if there are any."""
    return (("options",), dict(sampler.options)) if sampler.options else (("name",), sampler.name)


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, LINE // 3)
