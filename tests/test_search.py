"""Learned selection: the gates draw as they say, the search resumes to the bit, and it finds a planted answer."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import checkpoints
from models.diffusion import Diffusion
from models.dit import DiT, DiTConfig, initialise
from models.gates import GatedDiT, GatedOperator, Gates, add_lora, admissible_masks, gumbel, merge_lora
from models.streams import initialising
from models.surgery import graft, new_scion, scion_at
from pipeline.store import Partial, Store
from specs.graft import Edit, Site
from specs.job import StepResources
from specs.layers import Group
from specs.operators import HyenaY, Mlp
from specs.steps import SearchParams
from specs.training import SearchSpec, TrainingSpec
from stages import Context, search, training
from stages.latents import LatentsMeta, write_meta
from stages.search import SearchEngine
from stages.training import PlainEngine, TrainingSet, final_state, train

TINY = DiTConfig(input_size=8, in_channels=1, patch=2, depth=4, width=16, heads=2, num_classes=3)
CPU = torch.device("cpu")
GROUPS = (Group(blocks=(0, 1, 2), keep=1, pinned=()), Group(blocks=(3,), keep=1, pinned=()))
SITES = tuple(Site(block=block, target="mha") for block in (0, 1, 2))
RECIPE = SearchSpec(
    steps=12, batch=8, lr=3e-3, ema=0.7, clip=3.0, lora_rank=2, lora_alpha=4.0, checkpoint_every=4, nan_patience=3
)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@dataclass
class Reports:
    """A report that dies at `dies_at`."""

    dies_at: int | None = None

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        if done == self.dies_at:
            raise Killed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def lively(module: nn.Module, seed: int = 0) -> Any:
    """The module with every parameter random: nothing is hidden behind a zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=draws))
    return module


def edit_at(site: Site) -> Edit:
    return Edit(site=site, operator=HyenaY())


def make_gated(seed: int = 0, sites: Sequence[Site] = SITES, groups: Sequence[Group] = GROUPS) -> GatedDiT:
    """A gated model whose every trained weight, LoRA's second factor too, comes from the seed."""
    model = lively(DiT(TINY))
    scions = {site: lively(new_scion(model, edit_at(site), 0), seed + site.block) for site in sites}
    return GatedDiT(model, scions, groups, lora_rank=2, lora_alpha=4.0, seed=seed)


def stir(gated: GatedDiT) -> GatedDiT:
    """Random LoRA updates and gates."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in gated.parameters():
            if value.requires_grad:
                value.copy_(0.2 * torch.randn(value.shape, generator=draws))
    return gated


def make_batch(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1, 8, 8, generator=draws)
    return x, torch.randint(1000, (batch,), generator=draws), torch.arange(batch) % 3


def make_data() -> TrainingSet:
    draws = torch.Generator().manual_seed(1)
    return TrainingSet(torch.randn(30, 1, 8, 8, generator=draws), torch.arange(30) % 3, num_classes=3, device=CPU)


def run_search(
    partial: Partial,
    data: TrainingSet | None = None,
    recipe: SearchSpec = RECIPE,
    report: Reports | None = None,
    seed: int = 0,
    weights: int = 0,
) -> None:
    """Search from the scions and LoRA of that number, or from the checkpoint."""
    train(
        lambda state: SearchEngine(make_gated(weights), recipe, seed, state),
        data or make_data(),
        recipe,
        seed=seed,
        stream="search",
        partial=partial,
        report=report or Reports(),
    )


def state_of(partial: Partial) -> dict[str, Tensor]:
    path = partial.load(training.CHECKPOINT)
    assert path is not None
    return load_file(path)


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- masks and draws


@pytest.mark.parametrize(
    "group",
    [
        Group(blocks=blocks, keep=keep, pinned=pinned)
        for blocks in [(0, 1, 2, 3), (4, 5), (7, 8, 9, 10, 11)]
        for keep in range(len(blocks) + 1)
        for pinned in [(), blocks[:1], (blocks[1], blocks[-1])]
        if len(set(pinned)) <= keep
    ],
    ids=lambda group: f"{group.keep} of {group.blocks}, pinned {group.pinned}",
)
def test_the_masks_are_all_ways_to_keep_that_many_with_the_pinned_among_them(group: Group) -> None:
    group = group.model_copy(update={"pinned": tuple(sorted(set(group.pinned)))})
    tried = itertools.product([False, True], repeat=len(group.blocks))
    kept = [tuple(b for b, stays in zip(group.blocks, choice, strict=True) if stays) for choice in tried]
    expected = {blocks for blocks in kept if len(blocks) == group.keep and set(group.pinned) <= set(blocks)}
    masks = admissible_masks(group)
    assert set(masks) == expected and len(masks) == len(expected) and list(masks) == sorted(masks)


def gates_with(logits: Sequence[float]) -> Gates:
    gates = Gates([Group(blocks=(0, 1, 2), keep=2, pinned=()), Group(blocks=(3, 4), keep=1, pinned=())], 0.02)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor(logits))
    return gates


def test_at_the_start_every_mask_of_a_group_is_as_likely() -> None:
    gates = Gates(GROUPS, 0.02)
    assert [values.tolist() for values in gates.probabilities(100.0)] == [pytest.approx([1 / 3] * 3), [1.0]]


@pytest.mark.parametrize("temperature", [4.0, 0.1])
def test_masks_are_drawn_as_often_as_the_softmax_of_the_scaled_logits_says(temperature: float) -> None:
    gates, batch = gates_with([0.00, 0.01, 0.02, 0.03, 0.01]), 40_000
    drawn = gates.sample(gumbel(batch, 5, torch.Generator().manual_seed(0)), temperature, 100.0)
    first, second = gates.probabilities(100.0)
    for masks, probabilities, blocks in zip(gates.masks, (first, second), ((0, 1, 2), (3, 4)), strict=True):
        rows = torch.stack([drawn[block] for block in blocks], dim=1).detach()
        for mask, probability in zip(masks, probabilities, strict=True):
            wanted = torch.tensor([float(block in mask) for block in blocks])
            found = (rows == wanted).all(1).float().mean()
            assert found.item() == pytest.approx(probability.item(), abs=4 * (0.25 / batch) ** 0.5)


def test_the_groups_draw_independently() -> None:
    gates, batch = gates_with([0.0] * 5), 20_000
    drawn = gates.sample(gumbel(batch, 5, torch.Generator().manual_seed(0)), 1.0, 1.0)
    both = (drawn[0] * drawn[3]).mean()
    assert both.item() == pytest.approx((2 / 3) * (1 / 2), abs=0.02)


def test_a_draw_is_exactly_zero_or_one_and_keeps_as_many_as_the_group_does() -> None:
    gates = gates_with([0.3, -0.1, 0.2, 0.0, 0.1])
    drawn = gates.sample(gumbel(500, 5, torch.Generator().manual_seed(0)), 0.7, 3.0)
    rows = torch.stack([drawn[block] for block in range(5)], dim=1)
    assert set(rows.unique().tolist()) == {0.0, 1.0}
    assert rows[:, :3].sum(1).unique().tolist() == [2.0] and rows[:, 3:].sum(1).unique().tolist() == [1.0]


def test_the_gradient_of_a_hard_draw_is_that_of_the_soft_one() -> None:
    gates = gates_with([0.3, -0.1, 0.2, 0.0, 0.1])
    draws = torch.Generator().manual_seed(3)
    noise, weights = gumbel(6, 5, draws), torch.randn(5, 6, generator=draws)
    drawn = gates.sample(noise, 0.7, 3.0)
    (hard,) = torch.autograd.grad(sum((weights[block] * drawn[block]).sum() for block in range(5)), gates.logits)

    logits = gates.logits.detach().clone().requires_grad_()
    soft = []
    for part, masks, blocks in ((slice(0, 3), gates.masks[0], (0, 1, 2)), (slice(3, 5), gates.masks[1], (3, 4))):
        shares = ((logits[part] * 3.0 + noise[:, part]) / 0.7).softmax(1)
        soft += [sum(shares[:, i] for i, mask in enumerate(masks) if block in mask) for block in blocks]
    (expected,) = torch.autograd.grad(sum((weights[block] * soft[block]).sum() for block in range(5)), logits)
    torch.testing.assert_close(hard, expected)
    assert expected.abs().min() > 1e-3


def test_schedules_go_in_equal_steps_from_the_first_to_the_last_value() -> None:
    assert [search.at((4.0, 0.1), step, 14) for step in range(14)] == pytest.approx([4.0 - 0.3 * s for s in range(14)])


# -- the gated model


def plain_model(chosen: Mapping[Site, nn.Module]) -> DiT:
    model = lively(DiT(TINY))
    for site, scion in chosen.items():
        setattr(model.blocks[site.block], "attn" if site.target == "mha" else "mlp", scion)
    return model


@pytest.mark.parametrize("kept", range(3))
def test_at_the_start_each_example_passes_what_its_mask_says_of_the_unchanged_operators(kept: int) -> None:
    gated, batch = make_gated(), make_batch()
    scions = {site: scion_at(gated.model, site).scion for site in SITES if site.block != kept}
    noise = torch.zeros(5, 4)
    noise[:, kept] = 50.0
    gated.draw(noise, 1.0, 1.0)
    torch.testing.assert_close(gated(*batch), plain_model(scions)(*batch), rtol=0, atol=1e-5)


def test_examples_of_one_batch_have_gates_of_their_own() -> None:
    gated, batch = make_gated(), make_batch(3)
    gated.draw(50 * torch.eye(3, 4), 1.0, 1.0)
    together = gated(*batch)
    for example in range(3):
        gated.draw(50 * torch.eye(3, 4)[example : example + 1], 1.0, 1.0)
        alone = gated(*(part[example : example + 1] for part in batch))
        torch.testing.assert_close(together[example : example + 1], alone, rtol=0, atol=1e-5)


def test_only_the_gates_the_scions_and_lora_are_trained() -> None:
    gated = make_gated()
    trained = {name for name, value in gated.named_parameters() if value.requires_grad}
    lora = {name for name in trained if ".lora_" in name}
    scions = {name for name, _ in gated.named_parameters() if ".scion." in name}
    assert trained == lora | scions | {"gates.logits"} and len(scions) == 3 * 6


def test_every_linear_layer_of_the_rootstock_has_lora_of_the_asked_rank_and_nothing_else_has() -> None:
    model = lively(DiT(TINY))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    add_lora(model, 2, 4.0)
    factors = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    assert {name.split(".lora_")[0] for name in factors} == set(linears)
    for name, linear in linears.items():
        down, up = factors[f"{name}.lora_A.default.weight"], factors[f"{name}.lora_B.default.weight"]
        assert down.shape == (2, linear.in_features) and up.shape == (linear.out_features, 2)


def test_lora_changes_nothing_at_the_start_and_adds_alpha_over_rank_times_its_factors() -> None:
    linear = lively(nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(3, 6)
    before = linear(x)
    add_lora(linear, 2, 6.0)
    assert torch.equal(linear(x), before)
    with torch.no_grad():
        down, up = (linear[0].get_parameter(f"lora_{factor}.default.weight") for factor in "AB")
        up.normal_()
    after = linear(x)
    torch.testing.assert_close(after, before + 3.0 * x @ down.T @ up.T)
    merge_lora(linear)
    assert type(linear[0]) is nn.Linear
    torch.testing.assert_close(linear(x), after)


def test_lora_starts_from_the_seed_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    first = make_gated(3).state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert_same_bits(make_gated(3).state_dict(), first)
    torch.manual_seed(0)
    make_gated(3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kept", range(3))
def test_merging_gives_a_plain_model_that_does_what_the_gated_one_does_under_the_choice(kept: int) -> None:
    gated, batch = stir(make_gated()), make_batch()
    with torch.no_grad():
        gated.gates.logits.copy_(torch.eye(4)[kept])
    gated.draw(torch.zeros(5, 4), 1.0, 100.0)
    expected, before = gated(*batch), plain_model({})(*batch)
    assert gated.chosen() == tuple(site for site in SITES if site.block != kept)
    model = gated.merge()
    names = plain_model({site: new_scion(model, edit_at(site), 0) for site in SITES if site.block != kept}).state_dict()
    assert model.state_dict().keys() == names.keys()
    torch.testing.assert_close(model(*batch), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1  # the scions and LoRA are not nothing


def test_mlps_are_gated_as_attention_is() -> None:
    model, site = lively(DiT(TINY)), Site(block=1, target="mlp")
    scion = new_scion(model, Edit(site=site, operator=Mlp(ratio=3)), 0)
    gated = GatedDiT(model, {site: scion}, [Group(blocks=(0, 1), keep=1, pinned=())], lora_rank=2)
    gated.draw(torch.tensor([[50.0, 0.0]]).repeat(5, 1), 1.0, 1.0)
    torch.testing.assert_close(gated(*make_batch()), plain_model({site: scion})(*make_batch()), rtol=0, atol=1e-5)
    assert isinstance(gated.model.blocks[1].mlp, GatedOperator) and not isinstance(
        gated.model.blocks[1].attn, GatedOperator
    )


# -- the search


@pytest.mark.parametrize("deaths", [(3,), (6,), (9,), (12,), (6, 9, 12)], ids=str)
def test_a_search_that_was_killed_and_resumed_ends_in_the_same_bits(
    store: Store, monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(training, "POINTS", 4)  # points of both courses at 3, 6, 9, 12; checkpoints at 4, 8, 12
    monkeypatch.setattr(search, "POINTS", 4)
    data = make_data()
    data.latents[17] = math.nan  # so that steps are skipped, too
    run_search(store.partial("straight"), data)
    for death in (*deaths, None):
        weights = 99 if store.state("killed") == "partial" else 0
        try:
            run_search(store.partial("killed"), data, report=Reports(dies_at=death), weights=weights)
        except Killed:
            assert death is not None
    straight = state_of(store.partial("straight"))
    assert_same_bits(state_of(store.partial("killed")), straight)
    assert straight["counts"][1] > 0 and straight["course"].shape == (5, 5)


def test_the_gates_of_a_step_are_drawn_for_the_step_at_its_temperature_and_scale(store: Store) -> None:
    seen: list[tuple[Tensor, float, float]] = []

    class Watched(SearchEngine):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            draw = self.gated.draw
            self.gated.draw = lambda *drawn: (seen.append(drawn), draw(*drawn))[1]  # type: ignore[method-assign]

    recipe = RECIPE.model_copy(update={"logit_scale": (50.0, 100.0), "temperature": (4.0, 0.1)})
    for key in ("first", "again"):
        train(
            lambda state: Watched(make_gated(), recipe, 0, state),
            make_data(),
            recipe,
            seed=0,
            stream="search",
            partial=store.partial(key),
            report=Reports(),
        )
    noises = [noise for noise, _, _ in seen]
    assert all(torch.equal(one, other) for one, other in zip(noises[:12], noises[12:], strict=True))
    assert noises[0].shape == (8, 4) and len({noise.sum().item() for noise in noises[:12]}) == 12
    assert [seen[0][1:], seen[11][1:]] == [(4.0, 50.0), (0.1, 100.0)]


def test_the_gates_learn_at_their_own_rate(store: Store) -> None:
    moved = {}
    for rate in (1.0, 10.0):
        engine = SearchEngine(make_gated(), RECIPE.model_copy(update={"gate_lr": rate}), 0, None)
        before = [value.detach().clone() for value in engine.weights]
        engine.step(Diffusion().loss(engine, *make_batch(8), torch.randn(8, 1, 8, 8)).mean(), 1e-3)
        moved[rate] = {
            name: (value - old).abs().max().item()
            for name, value, old in zip(engine.names, engine.weights, before, strict=True)
        }
    # Adam's first step is as long as the rate.
    assert moved[1.0]["gates.logits"] == pytest.approx(1e-3, rel=1e-3)
    assert moved[10.0]["gates.logits"] == pytest.approx(1e-2, rel=1e-3)
    scion = "model.blocks.1.attn.scion.in_proj.weight"
    assert moved[10.0][scion] == moved[1.0][scion] == pytest.approx(1e-3, rel=1e-3)


def test_all_that_is_trained_is_averaged_and_kept_and_nothing_else(store: Store) -> None:
    run_search(store.partial("a"))
    state, _ = final_state(store.partial("a"))
    trained = {name for name, value in make_gated().named_parameters() if value.requires_grad}
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert {name.removeprefix(f"{kind}/") for name in state if name.startswith(f"{kind}/")} == trained
    assert not torch.equal(state["ema/gates.logits"], state["weights/gates.logits"])


def test_the_course_tells_what_the_averaged_gates_find_from_the_start_to_the_end(store: Store) -> None:
    run_search(store.partial("a"), recipe=RECIPE.model_copy(update={"logit_scale": (1.0, 30.0)}))
    state, _ = final_state(store.partial("a"))
    course = state["course"]
    assert course[:, 0].tolist() == list(range(13))
    assert course[0, 1:].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    last = (30.0 * state["ema/gates.logits"][:3]).softmax(0)
    torch.testing.assert_close(course[-1, 1:4].float(), last)
    assert last.max() > 0.5


def first_seen(data: TrainingSet, steps: int) -> list[list[int]]:
    """The samples of each step's batch."""
    return [training.shuffled(30, step * RECIPE.batch, RECIPE.batch, 0, "search").tolist() for step in range(steps)]


def test_steps_that_are_no_numbers_are_skipped_and_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    step = SearchEngine.step

    def watched(self: SearchEngine, loss: Tensor, lr: float) -> bool:
        before = [value.clone() for value in (*self.weights, *self.ema)]
        made.append(step(self, loss, lr))
        same = all(torch.equal(*pair) for pair in zip(before, (*self.weights, *self.ema), strict=True))
        assert same != made[-1]
        return made[-1]

    monkeypatch.setattr(SearchEngine, "step", watched)
    data = make_data()
    data.latents[17] = math.nan
    run_search(store.partial("a"), data)
    expected = [17 not in batch for batch in first_seen(data, 12)]
    assert made == expected and 0 < expected.count(False) < 6
    state, curve = final_state(store.partial("a"))
    last_made = max(at for at, taken in enumerate(expected, start=1) if taken)
    assert state["counts"].tolist() == [12, expected.count(False), 12 - last_made]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert [at for at, _ in curve] == [at for at, taken in enumerate(expected, start=1) if taken]


def test_a_point_of_the_curve_is_the_mean_over_the_steps_that_were_made(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    data.latents[17] = math.nan
    run_search(store.partial("fine"), data)
    monkeypatch.setattr(training, "POINTS", 1)
    run_search(store.partial("coarse"), data)
    fine, coarse = (final_state(store.partial(key))[1] for key in ("fine", "coarse"))
    assert coarse == [(12.0, pytest.approx(sum(loss for _, loss in fine) / len(fine), rel=1e-5))]


def test_steps_that_stay_no_numbers_stop_the_search(store: Store) -> None:
    data = make_data()
    data.latents[:] = math.nan
    with pytest.raises(FloatingPointError, match=r"in 3 steps in a row, up to step 3;"):
        run_search(store.partial("a"), data)


def test_a_search_can_begin_with_a_skipped_step_and_a_checkpoint(store: Store) -> None:
    data = make_data()
    for sample in first_seen(data, 1)[0][:1]:
        data.latents[sample] = math.nan
    recipe = RECIPE.model_copy(update={"checkpoint_every": 1})
    with pytest.raises(Killed):
        run_search(store.partial("killed"), data, recipe, Reports(dies_at=2))
    run_search(store.partial("killed"), data, recipe, weights=99)
    run_search(store.partial("straight"), data, recipe)
    assert_same_bits(state_of(store.partial("killed")), state_of(store.partial("straight")))


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_is_skipped_whichever_of_loss_and_gradient_is_no_number(spoilt: str) -> None:
    engine = SearchEngine(make_gated(), RECIPE, 0, None)
    loss = Diffusion().loss(engine, *make_batch(8), torch.randn(8, 1, 8, 8)).mean()
    if spoilt == "loss":
        loss = loss + math.inf
    else:
        loss = loss + (engine.weights[0].sum() * 0).sqrt()  # 0, with an infinite gradient
        assert loss.isfinite()
    assert engine.step(loss, 1e-3) is False and engine.skipped == 1


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = make_data()
    data.latents[17] = math.nan
    run_search(Store(f"{folder}/store").partial("two"), data)
    engine = SearchEngine(make_gated(), RECIPE, 0, None)
    loss = Diffusion().loss(engine, *make_batch(4), torch.zeros(4, 1, 8, 8)).mean()
    made = engine.step(loss + (math.inf if rank == 0 else 0.0), 1e-3)  # the gradient is a number on both
    Path(folder, f"made{rank}.json").write_text(json.dumps(made))
    dist.destroy_process_group()


def test_two_workers_end_where_one_does_up_to_rounding_and_agree_on_what_to_skip(tmp_path: Path) -> None:
    workers = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    store, data = Store(str(tmp_path / "store")), make_data()
    data.latents[17] = math.nan
    run_search(store.partial("one"), data)
    assert workers.wait(timeout=300) == 0
    one, two = state_of(store.partial("one")), state_of(store.partial("two"))
    assert one["counts"].tolist() == two["counts"].tolist() and one["counts"][1] > 0
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert [json.loads((tmp_path / f"made{rank}.json").read_text()) for rank in (0, 1)] == [False, False]


# -- the step as a whole


@dataclass
class Folder:
    """An artifact that the step needs."""

    key: str
    place: Path

    def path(self) -> Path:
        return self.place


CARRIED = Edit(site=Site(block=3, target="mlp"), operator=Mlp(ratio=2))


def make_context(folder: Path, store: Store, report: Reports | None = None, **changes: Any) -> Context:
    """A search step over a rootstock that carries an edit already."""
    inputs = {
        name: Folder(name, folder / name)
        for name in ("features", "base", *(f"scions/{edit_at(site).name}" for site in SITES))
    }
    (folder / "out").mkdir(parents=True)
    for made in inputs.values():
        made.place.mkdir(parents=True)
    data, model = make_data(), lively(graft(DiT(TINY), [CARRIED], 0))
    np.save(folder / "features" / "training_latents.npy", data.latents.numpy())
    np.save(folder / "features" / "training_labels.npy", data.labels.numpy())
    meta = LatentsMeta(codec="pixel", channels=1, side=8, classes=("a", "b", "c"), num_training=30, num_heldout=0)
    write_meta(folder / "features", meta)
    checkpoints.save(model, (CARRIED,), folder / "base")
    for site in SITES:
        scion = lively(new_scion(model, edit_at(site), 0), site.block)
        save_file(scion.state_dict(), inputs[f"scions/{edit_at(site).name}"].path() / "scion.safetensors")
    return Context(
        step="search/0",
        params=SearchParams(
            seed=0,
            candidates=tuple(edit_at(site) for site in SITES),
            groups=GROUPS,
            recipe=RECIPE.model_copy(update={"fraction": 0.5, **changes}),
        ),
        inputs=inputs,
        out=folder / "out",
        partial=store.partial(folder.name),
        report=report or Reports(),
        resources=StepResources(),
        device=CPU,
    )


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "launch", lambda work, context, workers, resources: work(context, CPU))


@pytest.mark.usefixtures("without_ray")
def test_a_search_step_leaves_the_choice_its_course_and_the_model_that_it_trained(tmp_path: Path, store: Store) -> None:
    context = make_context(tmp_path / "step", store)
    search.run(context)
    found = json.loads((context.out / "search.json").read_text())
    first, second = found["groups"]
    assert found["skipped_steps"] == 0 and found["warnings"] == []
    assert [first["blocks"], first["keep"], first["pinned"]] == [[0, 1, 2], 1, []]
    assert first["masks"] == [[0], [1], [2]] and sum(first["probabilities"]) == pytest.approx(1)
    assert first["confidence"] == max(first["probabilities"])
    (kept,) = first["masks"][first["probabilities"].index(first["confidence"])]
    assert found["chosen"] == first["chosen"] == [block for block in (0, 1, 2) if block != kept]
    assert [second["masks"], second["probabilities"], second["chosen"], second["decided"]] == [[[3]], [1.0], [], True]
    with (context.out / "course.csv").open() as file:
        rows = list(csv.reader(file))
    names = ["blocks 0-2 keeps 0", "blocks 0-2 keeps 1", "blocks 0-2 keeps 2", "blocks 3-3 keeps 3"]
    assert rows[0] == ["step", *names] and [float(row[0]) for row in rows[1:]] == list(range(13))
    assert [float(value) for value in rows[-1][1:4]] == pytest.approx(first["probabilities"])
    assert {path.name for path in context.out.glob("*.png")} == {"course.png", "loss.png"}

    model, edits = checkpoints.load(context.out / "hybrid")
    assert edits == (*(edit_at(site) for site in SITES if site.block != kept), CARRIED)
    gated, _ = search.build(context)
    state, _ = final_state(context.partial)
    gated.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("ema/")}, strict=False)
    noise = torch.zeros(5, 4)
    noise[:, kept] = 1e6
    gated.draw(noise, 1.0, 1.0)
    torch.testing.assert_close(model(*make_batch()), gated(*make_batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_ray")
def test_a_search_step_that_was_killed_and_resumed_leaves_the_same_files(tmp_path: Path, store: Store) -> None:
    straight = make_context(tmp_path / "straight", store)
    search.run(straight)
    killed = make_context(tmp_path / "killed", store, Reports(dies_at=6))
    with pytest.raises(Killed):
        search.run(killed)
    search.run(Context(**{**killed.__dict__, "report": Reports()}))
    files = sorted(path.relative_to(straight.out) for path in straight.out.rglob("*") if path.is_file())
    assert len(files) == 7
    assert [name for name in files if (straight.out / name).read_bytes() != (killed.out / name).read_bytes()] == []


@pytest.mark.usefixtures("without_ray")
def test_a_group_that_did_not_decide_is_warned_of(tmp_path: Path, store: Store) -> None:
    context = make_context(tmp_path / "step", store, logit_scale=(0.01, 0.01))
    search.run(context)
    found = json.loads((context.out / "search.json").read_text())
    assert [group["decided"] for group in found["groups"]] == [False, True]
    (line,) = found["warnings"]
    assert line.startswith("the group of blocks 0-2 did not decide") and "0.33" in line


@pytest.mark.usefixtures("without_ray")
def test_the_search_sees_the_asked_share_of_the_data(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(search, "train", lambda _, data, *__, **___: sizes.append(len(data.latents)))
    for number, fraction in enumerate((0.5, 1.0, 0.001)):
        search.search(make_context(tmp_path / str(number), store, fraction=fraction), CPU)
    assert sizes == [15, 30, 1]


# -- the planted answer

PLANTED = DiTConfig(input_size=8, in_channels=1, patch=4, depth=8, width=32, heads=2, num_classes=3)
PLANTED_GROUPS = (Group(blocks=(0, 1, 2, 3), keep=2, pinned=(0,)), Group(blocks=(4, 5, 6, 7), keep=2, pinned=()))
PLANTED_RECIPE = SearchSpec(steps=60, batch=32, lr=1e-3, ema=0.9, lora_rank=2, lora_alpha=4.0, checkpoint_every=60)


class Garbage(nn.Module):
    """Drowns what the model says in a large constant, which no training of this length takes back.

    Not larger still: a layer norm that sees nothing else passes no gradient on, and gates would learn nothing.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.value = nn.Parameter(10 * torch.randn(PLANTED.num_tokens, PLANTED.width, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), -1, -1)


@pytest.fixture(scope="module")
def rootstock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A model that has learned to tell noise: there is something to ruin."""
    torch.set_num_threads(1)
    recipe = TrainingSpec(steps=300, batch=32, lr=3e-3, ema=0.0, clip=1.0, checkpoint_every=300)
    partial = Store(str(tmp_path_factory.mktemp("rootstock"))).partial("base")

    def make_engine(state: Mapping[str, Tensor] | None) -> PlainEngine:
        with initialising(0, "planted"):
            model = DiT(PLANTED)
            initialise(model)
        return PlainEngine(model, clip=1.0, state=state)

    train(make_engine, planted_data(), recipe, seed=0, stream="base", partial=partial, report=Reports())
    state, curve = final_state(partial)
    assert curve[-1][1] < 0.6 * curve[0][1]
    return {name.removeprefix("weights/"): value for name, value in state.items() if name.startswith("weights/")}


def planted_data() -> TrainingSet:
    """One image a class."""
    draws = torch.Generator().manual_seed(4)
    images = torch.randn(3, 1, 8, 8, generator=draws).sign()
    return TrainingSet(images[torch.arange(60) % 3], torch.arange(60) % 3, num_classes=3, device=CPU)


@pytest.mark.parametrize(
    ("seed", "harmless"), [(0, (2, 3, 4, 5)), (1, (1, 2, 6, 7)), (2, (1, 3, 5, 6)), (3, (2, 3, 4, 7))]
)
def test_the_gates_find_the_sites_that_can_be_replaced(
    rootstock: dict[str, Tensor], store: Store, seed: int, harmless: tuple[int, ...]
) -> None:
    def make_engine(state: Mapping[str, Tensor] | None) -> SearchEngine:
        model = DiT(PLANTED)
        model.load_state_dict(rootstock, strict=False)
        copies = DiT(PLANTED)
        copies.load_state_dict(rootstock, strict=False)
        sites = [Site(block=block, target="mha") for block in range(1, 8)]
        scions = {s: scion_at(copies, s) if s.block in harmless else Garbage(s.block) for s in sites}
        gated = GatedDiT(model, scions, PLANTED_GROUPS, lora_rank=2, lora_alpha=4.0, seed=seed)
        return engines.setdefault("engine", SearchEngine(gated, PLANTED_RECIPE, seed, state))

    engines: dict[str, SearchEngine] = {}
    partial = store.partial("planted")
    train(make_engine, planted_data(), PLANTED_RECIPE, seed=seed, stream="search", partial=partial, report=Reports())
    gates = engines["engine"].gated.gates
    with torch.no_grad():
        gates.logits.copy_(final_state(partial)[0]["ema/gates.logits"])
    learned = search.outcome(gates, PLANTED_RECIPE, skipped=0)
    assert learned.chosen == harmless
    assert [group.decided for group in learned.groups] == [True, True] and learned.warnings == ()
    assert all(group.confidence > 0.9 for group in learned.groups)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
