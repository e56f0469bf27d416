"""What a graft is: the transformer and its tensors, diffusion, samplers, random streams, distances."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_fid.fid_score import calculate_frechet_distance
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.measures.costs import forward_flops, num_parameters
from graftwork.models.measures.frechet import Gaussian, Moments, distance
from graftwork.models.numerics.streams import SampleNoise, generator, initialising, seed_of
from graftwork.models.objectives import Network, over
from graftwork.models.objectives.gaussian import STEPS, Diffusion, discretised_log_likelihood, gaussian_kl, respaced
from graftwork.models.rootstocks.dit import DiT, DiTConfig, position_embedding
from graftwork.models.rootstocks.layers import TimestepEmbedding
from graftwork.models.sampling import sample
from graftwork.models.sampling.guidance import guided
from graftwork.specs.sampler import AncestralSampler, DdimSampler
from tests.small import TINY, Batch, block_of, lively

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


# -- the transformer


def published_tensors(depth: int, width: int, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """The published tensors, for patch 2, 4 latent channels and 1000 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, num_tokens, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.2.weight": (width, width),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (2 * 2 * 8, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * width, width),
        }
    biases = {
        name.replace(".weight", ".bias"): shape[:1]
        for name, shape in shapes.items()
        if name.endswith(".weight") and "embedding_table" not in name
    }
    return shapes | biases


@pytest.fixture(scope="module")
def xl2() -> DiT:
    with torch.device("meta"):
        return DiT(DiTConfig(input_size=32, in_channels=4, patch=2, depth=28, width=1152, heads=16, num_classes=1000))


def test_xl2_has_the_published_tensors(xl2: DiT) -> None:
    assert {name: tuple(value.shape) for name, value in xl2.state_dict().items()} == published_tensors(28, 1152, 256)


def test_xl2_has_the_published_number_of_parameters(xl2: DiT) -> None:
    # The published count takes in the fixed position embedding, which is a buffer here.
    assert num_parameters(xl2) + xl2.pos_embed.numel() == 675_129_632


def test_xl2_costs_the_published_flops(xl2: DiT) -> None:
    # 118.6 Gflops in arXiv 2212.09748, which counts a multiply-add once.
    assert forward_flops(xl2) / 2 == pytest.approx(118.6e9, rel=2e-3)


def test_the_position_embedding_follows_its_formula() -> None:
    side, width = TINY.input_size // TINY.patch, TINY.width
    expected = [
        [
            wave(place / 10_000 ** (k / (width / 4)))
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for k in range(width // 4)
        ]
        for row in range(side)
        for column in range(side)
    ]
    torch.testing.assert_close(position_embedding(TINY), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_a_timestep_is_described_by_cosines_then_sines() -> None:
    embedding = TimestepEmbedding(256)
    as_is = nn.Linear(256, 256, bias=False)
    nn.init.eye_(as_is.weight)
    embedding.mlp = nn.Sequential(as_is)
    angles = [7 * 10_000 ** (-k / 128) for k in range(128)]
    expected = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(embedding(torch.tensor([7])), expected, rtol=0, atol=1e-5)


def test_a_block_adds_its_operators_between_modulation_and_gate(model: DiT) -> None:
    x, c, block = torch.randn(2, 16, 16), torch.randn(2, 16), block_of(model, 1)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    linear = block.adaLN_modulation[1]
    assert isinstance(linear, nn.Linear)
    m = (F.silu(c) @ linear.weight.T + linear.bias).reshape(2, 6, 1, 16).unbind(1)
    y = x + m[2] * block.attn(norm(x) * (1 + m[1]) + m[0])
    y = y + m[5] * block.mlp(norm(y) * (1 + m[4]) + m[3])
    torch.testing.assert_close(block(x, c), y)


def test_patches_go_back_where_they_came_from() -> None:
    config = DiTConfig(**{**TINY.__dict__, "learn_sigma": False})
    image = torch.arange(2 * 3 * 64, dtype=torch.float32).reshape(2, 3, 8, 8)
    tokens = [
        [
            [image[b, c, 2 * row + p, 2 * column + q].item() for p in range(2) for q in range(2) for c in range(3)]
            for row in range(4)
            for column in range(4)
        ]
        for b in range(2)
    ]
    assert torch.equal(DiT(config).unpatchify(torch.tensor(tokens)), image)


def test_an_initialised_model_puts_out_zero(batch: Batch) -> None:
    model = DiT(TINY)
    model.initialise()
    output = model(*batch)
    assert output.shape == (4, 6, 8, 8) and not output.any()


def test_an_initialised_block_passes_its_input_through() -> None:
    model = DiT(TINY)
    model.initialise()
    x = torch.randn(2, 16, 16)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 16)), x)


# -- diffusion


ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def posterior(before: float, after: float, x0: float, x: float) -> tuple[float, float]:
    """Mean and variance of x[s] given x[t] and x0, by conditioning one Gaussian on another (alpha_bar at s and t)."""
    kept = after / before
    prior_mean, prior_var = math.sqrt(before) * x0, 1 - before
    gain = prior_var * math.sqrt(kept) / (kept * prior_var + 1 - kept)
    return prior_mean + gain * (x - math.sqrt(kept) * prior_mean), prior_var - gain * math.sqrt(kept) * prior_var


def filled(value: float, channels: int = 1) -> Tensor:
    return torch.full((1, channels, 1, 1), value, dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_noising_has_the_right_mean_and_spread(t: int) -> None:
    z = Diffusion().noised(
        torch.full((100_000, 1, 1, 1), 0.7), torch.full((100_000,), t), torch.randn(100_000, 1, 1, 1)
    )
    spread = math.sqrt(1 - ALPHA_BAR[t])
    assert z.mean().item() == pytest.approx(math.sqrt(ALPHA_BAR[t]) * 0.7, abs=5 * spread / math.sqrt(100_000))
    assert z.std().item() == pytest.approx(spread, rel=0.02)


def test_a_chain_on_a_device_has_its_constants_there_and_computes_the_same() -> None:
    assert {values.device.type for values in vars(Diffusion().on(torch.device("meta"))).values()} == {"meta"}
    (x, noise), t = torch.randn(2, 4, 3, 8, 8), torch.tensor([0, 9, 300, 999])
    condition = Condition(labels=torch.zeros(4).long())
    losses = [
        chain.loss(lambda x, t, condition: torch.cat([x, x], dim=1), x, t, condition, noise)
        for chain in (Diffusion(), Diffusion().on(x.device))
    ]
    assert torch.equal(*losses)


def test_removing_the_noise_gives_back_the_image() -> None:
    chain, x0, noise, t = Diffusion(), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 300, 600])
    torch.testing.assert_close(chain.x0_from_noise(chain.noised(x0, t, noise), t, noise), x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_posterior_is_that_of_two_gaussians(t: int) -> None:
    chain, at_t = Diffusion(), torch.tensor([t])
    mean, variance = posterior(ALPHA_BAR[t - 1], ALPHA_BAR[t], x0=0.4, x=-1.3)
    assert chain.posterior_mean(filled(0.4), filled(-1.3), at_t).item() == pytest.approx(mean, rel=1e-5)
    assert chain.min_log_var[t].item() == pytest.approx(math.log(variance), rel=1e-6)


def test_the_first_posterior_is_the_image_itself() -> None:
    mean = Diffusion().posterior_mean(filled(0.4), filled(-1.3), torch.tensor([0]))
    assert mean.item() == pytest.approx(0.4, rel=1e-6)


def test_the_first_log_variance_is_the_second_ones() -> None:
    chain = Diffusion()
    assert chain.min_log_var[0] == chain.min_log_var[1]


@pytest.mark.parametrize("t", [1, 400, 999])
@pytest.mark.parametrize("raw", [-1.0, 0.0, 0.5, 1.0])
def test_the_variance_output_moves_between_posterior_variance_and_beta(raw: float, t: int) -> None:
    _, smallest = posterior(ALPHA_BAR[t - 1], ALPHA_BAR[t], 0.0, 0.0)
    largest = 1 - ALPHA_BAR[t] / ALPHA_BAR[t - 1]
    share = (raw + 1) / 2
    expected = share * math.log(largest) + (1 - share) * math.log(smallest)
    assert Diffusion().log_variance(filled(raw), torch.tensor([t])).item() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_of_gaussians_is_torchs() -> None:
    mean, log_var, other_mean, other_log_var = torch.randn(4, 100, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_var / 2).exp()),
        torch.distributions.Normal(other_mean, (other_log_var / 2).exp()),
    )
    torch.testing.assert_close(gaussian_kl(mean, log_var, other_mean, other_log_var), expected)


@pytest.mark.parametrize(("mean", "log_var"), [(0.0, -4.0), (0.9, -1.0), (-1.2, -6.0)])
def test_the_256_levels_share_a_probability_of_one(mean: float, log_var: float) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    chances = discretised_log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, log_var)).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-6)


def hybrid_loss(output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return Diffusion().loss(lambda *_: output, x0, t, Condition(labels=torch.zeros_like(t)), noise)


@pytest.fixture
def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Network output (2C channels), x0, t and noise."""
    x0, noise = 0.5 * torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    predicted = noise + 0.3 * torch.randn(3, 2, 4, 4)
    return torch.cat([predicted, torch.rand(3, 2, 4, 4) - 0.5], 1), x0, torch.tensor([3, 400, 990]), noise


def test_the_bound_trains_the_variance_and_not_the_mean(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    output, x0, t, noise = example
    output.requires_grad_()
    (whole,) = torch.autograd.grad(hybrid_loss(output, x0, t, noise).sum(), output)
    (of_error,) = torch.autograd.grad((output[:, :2] - noise).square().flatten(1).mean(1).sum(), output)
    torch.testing.assert_close(whole[:, :2], of_error[:, :2])
    assert whole[:, 2:].ne(0).all()


@pytest.mark.parametrize("t", [1, 400, 990])
def test_the_loss_is_the_error_plus_the_divergence_in_bits(t: int) -> None:
    x0, noise, predicted, raw = 0.3, -0.8, -0.5, 0.2
    kept, before = ALPHA_BAR[t], ALPHA_BAR[t - 1]
    x = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise
    true_mean, true_var = posterior(before, kept, x0, x)
    mean, _ = posterior(before, kept, (x - math.sqrt(1 - kept) * predicted) / math.sqrt(kept), x)
    deviation = math.exp((0.6 * math.log(1 - kept / before) + 0.4 * math.log(true_var)) / 2)
    normal = torch.distributions.Normal
    bound = torch.distributions.kl_divergence(
        normal(torch.tensor(true_mean), math.sqrt(true_var)), normal(torch.tensor(mean), deviation)
    )
    output = torch.cat([filled(predicted), filled(raw)], 1)
    found = hybrid_loss(output, filled(x0), torch.tensor([t]), filled(noise)).item()
    assert found == pytest.approx((predicted - noise) ** 2 + bound.item() / math.log(2), rel=2e-3)


def published_cdf(x: float) -> float:
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_loss_at_the_first_timestep_is_the_published_likelihood_in_bits() -> None:
    # The published code takes the normal CDF by a tanh formula: far from the mean its likelihood is another.
    x0, noise, predicted, raw = 10 / 127.5 - 1, 0.7, -2.1, 0.5
    kept, chain = ALPHA_BAR[0], Diffusion()
    x = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise
    mean = (x - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)  # the first posterior is x0 itself
    deviation = math.exp((0.75 * math.log(1e-4) + 0.25 * chain.min_log_var[1].item()) / 2)
    above, below = ((x0 + side / 255 - mean) / deviation for side in (1, -1))
    chance = published_cdf(above) - published_cdf(below)
    exact = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([above, below], dtype=torch.float64))
    output = torch.cat([filled(predicted), filled(raw)], 1)
    bound = hybrid_loss(output, filled(x0), torch.tensor([0]), filled(noise)).item() - (predicted - noise) ** 2
    assert bound == pytest.approx(-math.log2(chance), rel=1e-5)
    assert bound != pytest.approx(-math.log2((exact[0] - exact[1]).item()), rel=1e-3)


def test_without_a_variance_the_loss_is_the_error_alone(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    output, x0, t, noise = example
    expected = (output[:, :2] - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(hybrid_loss(output[:, :2], x0, t, noise), expected)


CONSTANTS = ("alpha_bar", "x0_weight", "xt_weight", "min_log_var", "max_log_var")


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_chain_respaced_to_every_step_is_the_whole_chain(constant: str) -> None:
    assert torch.equal(getattr(respaced(STEPS), constant), getattr(Diffusion(), constant))


@pytest.mark.parametrize("count", [2, 4, 20, 250])
class TestRespacing:
    def test_both_ends_are_kept(self, count: int) -> None:
        timesteps = respaced(count).timesteps.tolist()
        assert len(set(timesteps)) == count and (timesteps[0], timesteps[-1]) == (0, 999)

    def test_the_noise_at_a_timestep_is_that_of_the_whole_chain(self, count: int) -> None:
        chain = respaced(count)
        np.testing.assert_allclose(chain.alpha_bar.numpy(), ALPHA_BAR[chain.timesteps.numpy()], rtol=1e-12)

    def test_the_posterior_is_that_of_its_own_longer_steps(self, count: int) -> None:
        chain = respaced(count)
        before, after = (ALPHA_BAR[chain.timesteps[i]] for i in (count - 2, count - 1))
        mean, variance = posterior(before, after, x0=0.4, x=-1.3)
        found = chain.posterior_mean(filled(0.4), filled(-1.3), torch.tensor([count - 1])).item()
        assert found == pytest.approx(mean, rel=1e-5)
        assert chain.min_log_var[-1].item() == pytest.approx(math.log(variance), rel=1e-6)


# -- sampling


def knows(x0: Tensor) -> Network:
    """A network that sees through the noise to x0; it is told timesteps of the whole chain."""

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kept = torch.from_numpy(ALPHA_BAR)[t][:, None, None, None]
        noise = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], 1).float()

    return network


def drawn(network: Network, sampler: Any, shape: tuple[int, ...], bounded: bool = False) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return sample(
        network,
        TINY.conditioner.example(shape[0], torch.device("cpu")),
        lambda: torch.randn(shape, generator=draws),
        sampler=sampler,
        conditioner=TINY.conditioner,
        objective=TINY.objective,
        bounded=bounded,
    )


@pytest.mark.parametrize("bounded", [False, True], ids=["latents", "pixels"])
@pytest.mark.parametrize("sampler", [DdimSampler(steps=10, guidance=1), AncestralSampler(steps=10, guidance=1)])
def test_a_network_that_knows_the_image_draws_it(sampler: Any, bounded: bool) -> None:
    x0 = torch.rand(3, 2, 4, 4) * 2 - 1
    torch.testing.assert_close(drawn(knows(x0), sampler, (3, 2, 4, 4), bounded), x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", [DdimSampler(steps=100, guidance=1), AncestralSampler(steps=250, guidance=1)])
def test_the_best_network_for_a_gaussian_draws_that_gaussian(sampler: Any) -> None:
    centre, spread = 0.6, 0.3

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kept = torch.from_numpy(ALPHA_BAR)[t][:, None, None, None].float()
        return (1 - kept).sqrt() * (x - kept.sqrt() * centre) / (kept * spread**2 + 1 - kept)

    samples = drawn(network, sampler, (4, 1, 64, 64))
    assert samples.mean().item() == pytest.approx(centre, abs=0.02)
    assert samples.std().item() == pytest.approx(spread, rel=0.05)


def test_pixels_stay_within_their_range() -> None:
    samples = drawn(knows(torch.full((1, 1, 2, 2), 3.0)), DdimSampler(steps=5, guidance=1), (1, 1, 2, 2), bounded=True)
    assert torch.equal(samples, torch.ones(1, 1, 2, 2))


def test_ddim_draws_noise_only_once(batch: Batch, model: DiT) -> None:
    calls = []

    def draw() -> Tensor:
        calls.append(1)
        return batch[0]

    sample(
        model,
        Condition(labels=batch[2]),
        draw,
        sampler=DdimSampler(steps=4),
        conditioner=TINY.conditioner,
        objective=TINY.objective,
        bounded=False,
    )
    assert len(calls) == 1


@pytest.fixture
def labelled() -> Network:
    """A network over 4 channels whose output tells the label: label + channel / 10."""
    channels = (torch.arange(8) / 10)[None, :, None, None]
    return lambda x, t, condition: over(condition.require("labels"), x) + channels.expand(len(x), 8, 2, 2)


def of(*labels: int) -> Condition:
    return Condition(labels=torch.tensor(labels))


def test_guidance_of_one_is_no_guidance(model: DiT) -> None:
    assert guided(model, of(1), TINY.conditioner, DdimSampler(guidance=1.0)) is model


@pytest.mark.parametrize(("channels", "count"), [("first_three", 3), ("all", 4)])
def test_guidance_moves_the_guided_channels_away_from_the_null_class(
    labelled: Network, channels: Any, count: int
) -> None:
    x, t = torch.zeros(2, 4, 2, 2), torch.zeros(2, dtype=torch.long)
    sampler = DdimSampler(guidance=4.0, guided_channels=channels)
    found = guided(labelled, of(1, 3), TINY.conditioner, sampler)(x, t, of(1, 3))
    expected = labelled(x, t, of(1, 3)).clone()
    expected[:, :count] = labelled(x, t, of(5 + 4 * (1 - 5), 5 + 4 * (3 - 5)))[:, :count]
    torch.testing.assert_close(found, expected)


def test_guiding_three_of_one_channel_guides_that_one(labelled: Network) -> None:
    def one_channel(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return labelled(x, t, condition)[:, :2]

    x, zero = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    found = guided(one_channel, of(1), TINY.conditioner, DdimSampler(guidance=2.0))(x, zero, of(1))
    torch.testing.assert_close(
        found, torch.cat([one_channel(x, zero, of(2 * 1 - 5))[:, :1], one_channel(x, zero, of(1))[:, 1:]], 1)
    )


# -- streams


def test_the_same_name_draws_the_same_numbers() -> None:
    first, second = (torch.randn(5, generator=generator(3, "base", "step", 7)) for _ in range(2))
    assert torch.equal(first, second)


def test_streams_of_different_names_differ() -> None:
    names: list[tuple[Any, ...]] = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", 1),
        (0, "a", 11),
        (0, "a", 1, 1),
        (0, 1, "a"),
    ]
    assert len({seed_of(*name) for name in names}) == len(names)


def test_a_stream_is_the_same_on_every_machine() -> None:
    assert seed_of(0, "base", "step", 7) == 4_309_296_474_290_142_759


def test_initialising_leaves_the_global_stream_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with initialising(0, "anything"):
        torch.randn(10)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("split", [(6,), (1, 5), (2, 2, 2), (5, 1)])
def test_any_split_into_batches_draws_the_same_noise(split: tuple[int, ...]) -> None:
    whole = SampleNoise(0, range(6), (2, 3), CPU)
    starts = [sum(split[:i]) for i in range(len(split))]
    parts = [SampleNoise(0, range(start, start + size), (2, 3), CPU) for start, size in zip(starts, split, strict=True)]
    for _ in range(3):
        assert torch.equal(torch.cat([part() for part in parts]), whole())


# -- costs and distances


def test_flops_of_a_forward_pass_are_those_of_the_formula() -> None:
    tokens, width, patch = TINY.num_tokens, TINY.width, TINY.patch
    block = tokens * width * (3 * width + width + 4 * width + 4 * width)  # qkv, proj, fc1, fc2
    block += 2 * tokens * tokens * width  # scores, and their weighted sum
    block += width * 6 * width  # modulation
    patches = tokens * width * TINY.in_channels * patch**2 + tokens * width * TINY.out_channels * patch**2
    condition = 256 * width + width * width + width * 2 * width  # timestep, and the final layer's modulation
    assert forward_flops(DiT(TINY)) == 2 * (TINY.depth * block + patches + condition)


def test_counting_flops_leaves_the_model_where_it_is(model: DiT) -> None:
    forward_flops(model)
    assert model.pos_embed.device == CPU


def test_parameters_are_counted_without_the_fixed_position_embedding() -> None:
    state = DiT(TINY).state_dict()
    assert num_parameters(DiT(TINY)) == sum(v.numel() for name, v in state.items() if name != "pos_embed")


def test_the_frechet_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    draws = np.random.default_rng(0)
    (mu, other_mu), (var, other_var) = draws.normal(size=(2, 6)), draws.uniform(0.1, 2, size=(2, 6))
    expected = ((mu - other_mu) ** 2).sum() + ((np.sqrt(var) - np.sqrt(other_var)) ** 2).sum()
    found = distance(Gaussian(mu, np.diag(var)), Gaussian(other_mu, np.diag(other_var)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_gaussian_is_fitted_with_the_unbiased_covariance() -> None:
    fitted = Moments.of(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).gaussian()
    np.testing.assert_array_equal(fitted.mu, [1.0, 3.0])
    np.testing.assert_array_equal(fitted.sigma, [[2.0, 4.0], [4.0, 8.0]])


def added(features: Tensor, *sizes: int) -> Moments:
    """The moments of the features, in batches of these sizes."""
    return reduce(add, map(Moments.of, features.split(sizes)))


@pytest.mark.parametrize("far", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(300,), (128, 128, 44), (1, 299), (7,) * 42 + (6,)], ids=str)
def test_moments_added_batch_by_batch_are_those_of_all_features_at_once(sizes: tuple[int, ...], far: float) -> None:
    """Also where the features lie so far from 0 that sums of their squares would have lost the variance."""
    features = torch.from_numpy(far + np.random.default_rng(0).normal(size=(300, 5)) * [1, 2, 3, 0.1, 1e-3])
    found = added(features, *sizes).gaussian()
    np.testing.assert_allclose(found.mu, features.numpy().mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(features.numpy(), rowvar=False)
    spread = np.sqrt(np.diag(expected))
    assert (np.abs(found.sigma - expected) / np.outer(spread, spread)).max() < 1e-6


def test_the_distance_of_moments_is_that_of_all_features_at_once() -> None:
    draws = np.random.default_rng(1)
    ours, theirs = draws.exponential(size=(400, 16)), draws.normal(size=(500, 16)) @ draws.normal(size=(16, 16))
    found = distance(
        added(torch.from_numpy(ours), *(50,) * 8).gaussian(), Moments.of(torch.from_numpy(theirs)).gaussian()
    )
    expected = calculate_frechet_distance(
        ours.mean(0), np.cov(ours, rowvar=False), theirs.mean(0), np.cov(theirs, rowvar=False)
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_gaussian_is_read_as_it_was_written(tmp_path: Path) -> None:
    fitted = added(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), 4, 5).gaussian()
    fitted.write(tmp_path / "one.npz")
    fitted.write(tmp_path / "other.npz")
    found = Gaussian.read(tmp_path / "one.npz")
    assert np.array_equal(found.mu, fitted.mu) and np.array_equal(found.sigma, fitted.sigma)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


# -- compiled


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_samples_up_to_rounding() -> None:
    config = DiTConfig(input_size=4, in_channels=3, patch=2, depth=1, width=16, heads=2, num_classes=5)
    model: Any = lively(DiT(config)).eval()
    eager, compiled = (
        drawn(network, DdimSampler(steps=3), (2, 3, 4, 4), bounded=True) for network in (model, torch.compile(model))
    )
    assert eager.abs().min() < 0.9  # not all of it is clamped
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
