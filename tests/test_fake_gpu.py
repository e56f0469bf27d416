"""Devices on a GPU that is none: tensors say `cuda` and hold nothing, so that whoever mixes devices is found here.

FakeTensorMode runs every operation for its shape, type and device. It cannot run backward, so the gradients of a step
are put in; and it does not see an index on the GPU into a tensor of the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graftwork.models import surgery
from graftwork.models.condition import Condition
from graftwork.models.measures.classifier import Classifier
from graftwork.models.measures.frechet import Moments
from graftwork.models.measures.locality import Locality, by_displacement
from graftwork.models.numerics.precision import computing
from graftwork.models.numerics.streams import SampleNoise, generator
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.operators import REGISTRY, attention, build_operator, kernels
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.sampling import sample
from graftwork.models.selection.budget import Budget
from graftwork.models.selection.gates import Gate, GatedOperator, Gates
from graftwork.specs.edits import Site
from graftwork.specs.operators import HyenaX, HyenaY, Mha, Place, Swa
from graftwork.specs.sampler import AncestralSampler, DdimSampler, Sampler
from graftwork.specs.training import DistillSpec, Precision, TrainingSpec
from graftwork.stages.artifacts.latents import Noised
from graftwork.stages.distillation import sources
from graftwork.stages.distillation.activations import Pairs, Teacher
from graftwork.stages.distillation.distill import learn
from graftwork.stages.distillation.loss import LOSSES, error
from graftwork.stages.distillation.sources import InMemory, Recomputed
from graftwork.stages.selection.profile import Tally
from graftwork.stages.training import batches
from graftwork.stages.training.batches import TrainingSet, draw_batch
from graftwork.stages.training.engine import PlainEngine
from tests.test_operators import KERNELS, PACKAGES

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
XL2 = Place(1152, 16, 256)
CONFIG = DiTConfig(input_size=8, in_channels=4, patch=2, depth=2, width=32, heads=2, num_classes=3)
BATCH = 6
H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
in_every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch take a GPU for granted wherever it would ask the driver, but for `torch.cuda.is_available`."""
    # DeepSpeed sets it when it is imported, and torch.cuda.is_available would then count the GPU below.
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda index: H100, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    attention.band_mask.cache_clear()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.allow_scalar_outputs = True
    with mode:
        yield
    attention.band_mask.cache_clear()


def on_card(make: Callable[[], Any]) -> Any:
    """What `make` returns, made on the GPU. The default device must not outlast it: it would hide mistakes."""
    with CUDA:
        return make()


def given(*shape: int, device: torch.device = CUDA, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype)


def indices(device: torch.device = CUDA) -> Tensor:
    return torch.zeros(BATCH, dtype=torch.long, device=device)


def latents(device: torch.device = CUDA) -> Tensor:
    return given(BATCH, CONFIG.in_channels, CONFIG.input_size, CONFIG.input_size, device=device)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return given(BATCH, CONFIG.num_tokens, CONFIG.width, dtype=dtype)


@pytest.fixture
def model() -> DiT:
    return on_card(lambda: DiT(CONFIG))


@contextlib.contextmanager
def gradients_put_in(engine: PlainEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, `backward` leaves a gradient beside every weight."""

    def backward(loss: Tensor) -> None:
        assert loss.device == CUDA and loss.dim() == 0
        for weight in engine.weights:
            weight.grad = torch.empty_like(weight)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        yield


def test_a_mixture_of_devices_is_found_here() -> None:
    with pytest.raises(Exception, match="device"):
        given(3) + given(3, device=HOST)


@in_every_precision
def test_a_forward_pass_stays_on_the_gpu(model: DiT, precision: Precision) -> None:
    with computing(precision, CUDA):
        output = model(latents(), indices(), indices())
    assert output.device == CUDA
    assert output.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@in_every_precision
def test_a_training_step_stays_on_the_gpu(model: DiT, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = CONFIG.conditioner.example(20, HOST)
    data = TrainingSet(given(20, 4, 8, 8, device=HOST), condition, CONFIG.conditioner, CONFIG.objective, CUDA)
    batch = draw_batch(data, TrainingSpec(batch=BATCH), 0, "test", 0, 0, 2)
    assert {part.device for part in (batch.x, batch.t, batch.condition.require("labels"), batch.noise)} == {HOST}
    x, t, condition, noise = batch.pinned().to(CUDA)
    engine = PlainEngine(model, clip=1.0, ema=0.999, state=None)
    with computing(precision, CUDA):
        loss = Diffusion().on(CUDA).loss(engine, x, t, condition, noise).mean()
    with gradients_put_in(engine, monkeypatch):
        assert engine.step(loss, 1e-3)
    moments = [value for state in engine.adam.state.values() for value in state.values()]
    assert {value.device for value in (*engine.weights, *engine.ema, *moments)} == {CUDA}
    assert {value.device for value in engine.state().values()} == {HOST}


def test_a_training_goes_on_on_the_gpu_from_what_it_left_on_the_host(
    model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PlainEngine(model, clip=1.0, ema=0.999, state=None)
    with gradients_put_in(engine, monkeypatch):
        engine.step(given(), 1e-3)
    again = PlainEngine(on_card(lambda: DiT(CONFIG)), clip=1.0, ema=0.999, state=engine.state())
    with gradients_put_in(again, monkeypatch):
        again.step(given(), 1e-3)
    assert {value.device for state in again.adam.state.values() for value in state.values()} == {CUDA}


@in_every_precision
@pytest.mark.parametrize(
    ("sampler", "bounded"),
    [(AncestralSampler(steps=3), True), (DdimSampler(steps=3), False)],
    ids=["ancestral, pixels", "ddim, latents"],
)
def test_a_sampling_stays_on_the_gpu(model: DiT, sampler: Sampler, bounded: bool, precision: Precision) -> None:
    noise = SampleNoise(0, range(BATCH), (4, 8, 8), CUDA)
    with computing(precision, CUDA):
        drawn = sample(
            model,
            Condition(labels=indices()),
            noise,
            sampler=sampler,
            conditioner=CONFIG.conditioner,
            objective=CONFIG.objective,
            bounded=bounded,
        )
    assert drawn.device == CUDA and drawn.dtype == torch.float32 and drawn.shape == (BATCH, 4, 8, 8)


@in_every_precision
def test_what_stands_in_the_sites_is_observed_on_the_gpu(model: DiT, precision: Precision) -> None:
    sites = [Site(block=0, target="mha"), Site(block=1, target="mlp"), Site(block=0, target="pair")]
    with computing(precision, CUDA):
        seen = surgery.observe(model, sites, latents(), indices(), indices())
    held = [value for one in seen.values() for value in (*one.inputs, one.output, one.gate) if value is not None]
    assert list(seen) == sites and {value.device for value in held} == {CUDA}


class InThisThread:
    """An executor for tensors that are not there, of which one thread at a time may make any."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done = Future[Any]()
        done.set_result(work(*args))
        return done

    def shutdown(self, **_: Any) -> None: ...


@pytest.mark.parametrize("place", [CUDA, HOST], ids=["on the gpu", "on the host"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_distillation_stays_on_the_gpu_wherever_activations_are_kept(
    place: torch.device, shuffled: bool, loss: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ThreadPoolExecutor", InThisThread)
    scion = on_card(lambda: build_operator(HyenaY(), CONFIG.place))
    engine = PlainEngine(scion, clip=1.0, state=None)
    inputs, outputs = (given(10, CONFIG.num_tokens, CONFIG.width, device=place) for _ in range(2))
    weights = given(10, 1, CONFIG.width, device=place) if weighted else None
    order = torch.randperm(10, generator=generator(0, "order")).to(CUDA) if shuffled else None
    for pairs in InMemory(Pairs((inputs,), outputs, weights), CUDA).batches(BATCH, order):
        assert {value.device for value in pairs.tensors()} == {CUDA}
        with torch.no_grad():
            assert error(scion, pairs, LOSSES[loss]).device == CUDA
        with gradients_put_in(engine, monkeypatch):
            assert learn(engine, scion, pairs, LOSSES[loss], 1e-3).device == CUDA


@pytest.mark.parametrize("shuffled", [False, True])
def test_activations_on_the_gpu_take_no_way_through_the_host(shuffled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's device has no number, what lies there has."""
    monkeypatch.setattr(sources, "_gathered", None)  # what takes batches out of the host's memory
    tensors = given(10, CONFIG.num_tokens, CONFIG.width), given(10, CONFIG.num_tokens, CONFIG.width)
    kept = InMemory(Pairs(tensors[:1], tensors[1], None), torch.device("cuda"))
    order = torch.randperm(10, generator=generator(0, "order")) if shuffled else None
    assert {value.device for pairs in kept.batches(BATCH, order) for value in pairs.tensors()} == {CUDA}


def test_gates_and_their_budget_stay_on_the_gpu() -> None:
    gates = on_card(lambda: Gates([Gate.of_site(0, 2), Gate.of_site(1, 2)], 0.02))
    holds = gates.sample(given(BATCH, len(gates.logits)), 1.0, 100.0)
    assert {value.device for value in holds.values()} == {CUDA}
    budget = Budget(0.9, 1000, {0: (100, 60, 50), 1: (100, 60, 50)})
    assert budget.miss(gates.probabilities(100.0)).device == CUDA
    original, *scions = (on_card(partial(build_operator, spec, CONFIG.place)) for spec in (Mha(), HyenaY(), HyenaX()))
    operator = GatedOperator(original, scions)
    operator.holds = holds[0]
    assert operator(tokens()).device == CUDA


def test_the_profile_is_taken_on_the_gpu(model: DiT) -> None:
    tally = Tally(CUDA)
    tally.add(tokens())
    assert {value.device for value in (tally.powers, tally.largest, tally.counts)} == {CUDA}
    block: Any = model.blocks[0]
    locality = Locality((4, 4), CUDA)  # samples are chosen by the values of their timesteps, which are not there
    chunks = [by_displacement(chunk, 4) for _, chunk in locality._chunks(block.attn, tokens())]
    assert {value.device for value in (locality.mass, *chunks)} == {CUDA}


def test_samples_are_scored_on_the_gpu() -> None:
    classifier = on_card(lambda: Classifier(4, 8, 3)).eval()
    assert classifier(latents()).device == CUDA
    ones, others = Moments.of(given(5, 3)), Moments.of(given(4, 3))
    assert (ones + others).scatter.device == CUDA


@pytest.mark.parametrize("place", [CUDA, HOST], ids=["on the gpu", "on the host"])
@pytest.mark.parametrize("weighted", [False, True])
def test_activations_are_recorded_where_they_are_to_be_kept(
    model: DiT, place: torch.device, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    noisy = Noised(latents(HOST), indices(HOST), Condition(labels=indices(HOST)))
    recipe = DistillSpec(precision="bf16", gate_weighted=weighted)
    teacher = Teacher(model, (), noisy, noisy, recipe, CUDA)
    sites = [Site(block=0, target="mha"), Site(block=1, target="mlp"), Site(block=0, target="pair")]
    captured = teacher.capture(sites, noisy, place)
    held = [value for pairs in captured.values() for value in pairs.tensors()]
    assert list(captured) == sites and {value.device for value in held} == {place}
    again = Recomputed(teacher, sites[0], noisy, BATCH // 2).batches(2)
    assert {value.device for pairs in again for value in pairs.tensors()} == {CUDA}


# -- the compiler


@pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind().kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_operator_is_compiled_whole_for_a_gpu(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in KERNELS:  # as where none is installed
        monkeypatch.setattr(kernel, "module", "of_no_package")
        monkeypatch.setattr(kernel, "fused", None)
        monkeypatch.setattr(kernel, "failure", None)
    monkeypatch.setattr(kernels, "DECISIONS", set())
    torch._dynamo.reset()
    operator = on_card(lambda: build_operator(kind(), XL2))
    for module in operator.modules():  # Module.to exchanges data, which fake tensors do not
        for name, value in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(value.detach().to(dtype)))
    with torch.no_grad():
        y = torch.compile(operator, fullgraph=True, backend="eager")(given(2, 256, 1152, dtype=dtype))
    assert y.device == CUDA and y.dtype == dtype and y.shape == (2, 256, 1152)
    asked = {kernel for kernel in KERNELS if kernel.failure == "there is no module of_no_package here"}
    assert asked == {kernel for kernel in PACKAGES.get(kind, []) if dtype in kernel.dtypes}
    called = {decision.kernel for decision in kernels.DECISIONS if decision.obstacle is None}
    assert called == ({"FlexAttention"} if kind is Swa else set())
