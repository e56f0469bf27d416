"""Learned selection: the gates draw as they say, the search resumes to the bit, meets its budget, and finds a planted
answer."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from benchmarks.artifacts import Folder
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.lora import add_lora, merge_lora
from graftwork.models.measures.costs import forward_flops
from graftwork.models.numerics.streams import initialising
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.operators import REGISTRY
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.selection.budget import Budget, budget_of
from graftwork.models.selection.gates import Gate, GatedOperator, GatedRootstock, Gates, admissible_masks, gumbel
from graftwork.models.surgery import graft, new_scion, scion_at
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.partial import Partial
from graftwork.specs.costs import ORIGINALS
from graftwork.specs.edits import Edit, Site
from graftwork.specs.layers.learned import Group
from graftwork.specs.operators import HyenaY, Mlp, MlpHyenaX, NoOperator, Operator
from graftwork.specs.resources import StepResources
from graftwork.specs.training import SearchSpec, TrainingSpec
from graftwork.stages.artifacts.evidence import read_search
from graftwork.stages.artifacts.latents import LatentsMeta, write_meta
from graftwork.stages.catalog.search import SearchParams
from graftwork.stages.contract import Context
from graftwork.stages.selection import search
from graftwork.stages.selection.search import SearchEngine
from graftwork.stages.training import loop as training
from graftwork.stages.training.batches import TrainingSet, draw_batch, shuffled
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import final_state, set_up_blocks, train
from tests import small
from tests.products import Products
from tests.small import noting
from tests.tiny_training import Killed, Reports, latents_of, lively, make_data

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = DiTConfig(input_size=8, in_channels=1, patch=2, depth=4, width=16, heads=2, num_classes=3)
CPU = torch.device("cpu")
GROUPS = (Group(blocks=(0, 1, 2), keep=1, pinned=()), Group(blocks=(3,), keep=1, pinned=()))
SITES = tuple(Site(block=block, target="mha") for block in (0, 1, 2))
RECIPE = SearchSpec(
    steps=12, batch=8, lr=3e-3, ema=0.7, clip=3.0, lora_rank=2, lora_alpha=4.0, checkpoint_every=4, nan_patience=3
)


def edit_at(site: Site) -> Edit:
    return Edit(site=site, operator=HyenaY())


def make_gated(seed: int = 0, sites: Sequence[Site] = SITES, groups: Sequence[Group] = GROUPS) -> GatedRootstock:
    """A gated model whose every trained weight, LoRA's second factor too, comes from the seed."""
    model = lively(DiT(TINY))
    scions = {site: [lively(new_scion(model, edit_at(site), 0), seed + site.block)] for site in sites}
    return GatedRootstock(model, scions, [*map(Gate.of_group, groups)], lora_rank=2, lora_alpha=4.0, seed=seed)


OPTIONS: tuple[Operator, ...] = (Mlp(ratio=2), Mlp(ratio=1), MlpHyenaX(ratio=1))
CHOICES = tuple(
    Edit(site=Site(block=block, target="mlp"), operator=operator, option=option)
    for block in range(4)
    for option, operator in enumerate(OPTIONS)
)


def make_budgeted(
    seed: int = 0, share: float = 0.8, candidates: Sequence[Edit] = CHOICES, carried: Sequence[Edit] = ()
) -> GatedRootstock:
    """A gated model of whose sites each may hold several scions."""
    model = lively(graft(DiT(TINY), carried, 0))
    scions: dict[Site, list[nn.Module]] = {}
    for number, edit in enumerate(candidates):
        scions.setdefault(edit.site, []).append(lively(new_scion(model, edit, 0), seed + number))
    gates = [Gate.of_site(site.block, len(beside)) for site, beside in scions.items()]
    budget = budget_of(share, TINY, carried, candidates)
    return GatedRootstock(model, scions, gates, budget, lora_rank=2, lora_alpha=4.0, seed=seed)


def stir(gated: GatedRootstock) -> GatedRootstock:
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


def loss_of(engine: SearchEngine, batch: int, noise: Tensor) -> Tensor:
    x, t, labels = make_batch(batch)
    return Diffusion().loss(engine, x, t, Condition(labels=labels), noise).mean()


def run_search(
    partial: Partial,
    data: TrainingSet | None = None,
    recipe: SearchSpec = RECIPE,
    report: Reports | None = None,
    seed: int = 0,
    weights: int = 0,
    make: Callable[[int], GatedRootstock] = make_gated,
) -> None:
    """Search from the scions and LoRA of that number, or from the checkpoint."""
    train(
        lambda state: SearchEngine(make(weights), recipe, seed, state),
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


FIVE = (Group(blocks=(0, 1, 2), keep=2, pinned=()), Group(blocks=(3, 4), keep=1, pinned=()))


def keeps(drawn: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """By block (B,): 1 where an example keeps the original; what a site holds is always one thing."""
    assert all(torch.equal(holds.detach().sum(1), torch.ones(len(holds))) for holds in drawn.values())
    return {block: holds[:, 0] for block, holds in drawn.items()}


def gates_with(logits: Sequence[float]) -> Gates:
    gates = Gates([*map(Gate.of_group, FIVE)], 0.02)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor(logits))
    return gates


def test_at_the_start_every_mask_of_a_group_is_as_likely() -> None:
    gates = Gates([*map(Gate.of_group, GROUPS)], 0.02)
    assert [values.tolist() for values in gates.probabilities(100.0)] == [pytest.approx([1 / 3] * 3), [1.0]]


@pytest.mark.parametrize("temperature", [4.0, 0.1])
def test_masks_are_drawn_as_often_as_the_softmax_of_the_scaled_logits_says(temperature: float) -> None:
    gates, batch = gates_with([0.00, 0.01, 0.02, 0.03, 0.01]), 40_000
    drawn = keeps(gates.sample(gumbel(batch, 5, torch.Generator().manual_seed(0)), temperature, 100.0))
    for group, probabilities in zip(FIVE, gates.probabilities(100.0), strict=True):
        rows = torch.stack([drawn[block] for block in group.blocks], dim=1).detach()
        for mask, probability in zip(admissible_masks(group), probabilities, strict=True):
            wanted = torch.tensor([float(block in mask) for block in group.blocks])
            found = (rows == wanted).all(1).float().mean()
            assert found.item() == pytest.approx(probability.item(), abs=4 * (0.25 / batch) ** 0.5)


def test_the_groups_draw_independently() -> None:
    gates, batch = gates_with([0.0] * 5), 20_000
    drawn = keeps(gates.sample(gumbel(batch, 5, torch.Generator().manual_seed(0)), 1.0, 1.0))
    both = (drawn[0] * drawn[3]).mean()
    assert both.item() == pytest.approx((2 / 3) * (1 / 2), abs=0.02)


def test_a_draw_is_exactly_zero_or_one_and_keeps_as_many_as_the_group_does() -> None:
    gates = gates_with([0.3, -0.1, 0.2, 0.0, 0.1])
    drawn = keeps(gates.sample(gumbel(500, 5, torch.Generator().manual_seed(0)), 0.7, 3.0))
    rows = torch.stack([drawn[block] for block in range(5)], dim=1)
    assert set(rows.unique().tolist()) == {0.0, 1.0}
    assert rows[:, :3].sum(1).unique().tolist() == [2.0] and rows[:, 3:].sum(1).unique().tolist() == [1.0]


def test_a_draw_takes_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = gates_with([0.3, -0.1, 0.2, 0.0, 0.1])
    monkeypatch.setattr(Gate, "options_of", None)  # what makes tables on the host
    gates.sample(gumbel(2, 5, torch.Generator().manual_seed(0)), 0.7, 3.0)
    moved = gates.to("meta")
    assert {value.device.type for value in (*moved.buffers(), *moved.parameters())} == {"meta"}
    assert set(gates.state_dict()) == {"logits"}  # checkpoints hold them not


def test_the_gradient_of_a_hard_draw_is_that_of_the_soft_one() -> None:
    gates = gates_with([0.3, -0.1, 0.2, 0.0, 0.1])
    draws = torch.Generator().manual_seed(3)
    noise, weights = gumbel(6, 5, draws), torch.randn(5, 6, generator=draws)
    drawn = keeps(gates.sample(noise, 0.7, 3.0))
    (hard,) = torch.autograd.grad((weights * torch.stack([drawn[block] for block in range(5)])).sum(), gates.logits)

    logits = gates.logits.detach().clone().requires_grad_()
    soft = []
    for part, group in zip((slice(0, 3), slice(3, 5)), FIVE, strict=True):
        shares, masks = ((logits[part] * 3.0 + noise[:, part]) / 0.7).softmax(1), admissible_masks(group)
        soft += [
            torch.stack([shares[:, i] for i, mask in enumerate(masks) if block in mask]).sum(0)
            for block in group.blocks
        ]
    (expected,) = torch.autograd.grad((weights * torch.stack(soft)).sum(), logits)
    torch.testing.assert_close(hard, expected)
    assert expected.abs().min() > 1e-3


def test_schedules_go_in_equal_steps_from_the_first_to_the_last_value() -> None:
    assert [search.at((4.0, 0.1), step, 14) for step in range(14)] == pytest.approx([4.0 - 0.3 * s for s in range(14)])


# -- the gated model


def scions_at(gated: GatedRootstock, site: Site) -> list[nn.Module]:
    """What the site may hold, beside the operator that was there."""
    operator = scion_at(gated.model, site)
    assert isinstance(operator, GatedOperator)
    return list(operator.scions)


def plain_model(chosen: Mapping[Site, nn.Module]) -> DiT:
    model = lively(DiT(TINY))
    for site, scion in chosen.items():
        setattr(model.blocks[site.block], "attn" if site.target == "mha" else "mlp", scion)
    return model


@pytest.mark.parametrize("kept", range(3))
def test_at_the_start_each_example_passes_what_its_mask_says_of_the_unchanged_operators(kept: int) -> None:
    gated, batch = make_gated(), make_batch()
    scions = {site: scions_at(gated, site)[0] for site in SITES if site.block != kept}
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
    scions = {name for name, _ in gated.named_parameters() if ".scions.0." in name}
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


WITH_LAYERS = [kind for kind in REGISTRY if "mha" in kind.targets and kind is not NoOperator]


@pytest.mark.parametrize("kind", WITH_LAYERS, ids=lambda kind: kind.__name__)
def test_whatever_the_rootstock_carries_has_lora_too(kind: Any) -> None:
    edit = Edit(site=Site(block=0, target="mha"), operator=kind())
    model, inputs = lively(graft(DiT(TINY), [edit], 0)), draw_batch(make_data(), RECIPE, 0, "search", 0, 0, 1)[:3]
    before = model(*inputs)
    add_lora(model, 2, 4.0)
    torch.testing.assert_close(model(*inputs), before)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    learned = model(*inputs)
    assert not torch.allclose(learned, before)
    learned.sum().backward()
    wanted = [value.grad for name, value in model.named_parameters() if "lora_B" in name and "blocks.0.attn" in name]
    assert wanted and all(gradient is not None for gradient in wanted)
    merge_lora(model)
    torch.testing.assert_close(model(*inputs), learned, rtol=1e-4, atol=1e-5)


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
    assert gated.choice() == {site: int(site.block != kept) for site in SITES}
    model = gated.merge()
    names = plain_model({site: new_scion(model, edit_at(site), 0) for site in SITES if site.block != kept}).state_dict()
    assert model.state_dict().keys() == names.keys()
    torch.testing.assert_close(model(*batch), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1  # the scions and LoRA are not nothing


def test_mlps_are_gated_as_attention_is() -> None:
    model, site = lively(DiT(TINY)), Site(block=1, target="mlp")
    scion = new_scion(model, Edit(site=site, operator=Mlp(ratio=3)), 0)
    gate = Gate.of_group(Group(blocks=(0, 1), keep=1, pinned=()))
    gated = GatedRootstock(model, {site: [scion]}, [gate], lora_rank=2)
    gated.draw(torch.tensor([[50.0, 0.0]]).repeat(5, 1), 1.0, 1.0)
    torch.testing.assert_close(gated(*make_batch()), plain_model({site: scion})(*make_batch()), rtol=0, atol=1e-5)
    assert isinstance(gated.model.blocks[1].mlp, GatedOperator) and not isinstance(
        gated.model.blocks[1].attn, GatedOperator
    )


# -- the search


RESUMES = [(make_gated, deaths) for deaths in [(3,), (6,), (9,), (12,), (6, 9, 12)]]


@pytest.mark.parametrize(
    ("make", "deaths"),
    [*RESUMES, (make_budgeted, (6,)), (make_budgeted, (6, 9, 12))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_search_that_was_killed_and_resumed_ends_in_the_same_bits(
    store: Store, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], GatedRootstock], deaths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(training, "POINTS", 4)  # points of both courses at 3, 6, 9, 12; checkpoints at 4, 8, 12
    monkeypatch.setattr(search, "POINTS", 4)
    data = make_data()
    latents_of(data)[17] = math.nan  # so that steps are skipped, too
    recipe = RECIPE.model_copy(update={"logit_scale": (50.0, 100.0)})
    run_search(store.partial("straight"), data, recipe, make=make)
    for death in (*deaths, None):
        weights = 99 if store.state("killed") == "partial" else 0
        try:
            run_search(store.partial("killed"), data, recipe, Reports(dies_at=death), weights=weights, make=make)
        except Killed:
            assert death is not None
    straight = state_of(store.partial("straight"))
    assert_same_bits(state_of(store.partial("killed")), straight)
    assert straight["counts"][1] > 0 and straight["course"].shape == (5, 1 + sum(make(0).gates.sizes))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_every_product_of_a_search_has_its_precision(store: Store, precision: str) -> None:
    with Products() as counted:
        run_search(store.partial("a"), recipe=RECIPE.model_copy(update={"precision": precision}))
    found = counted.matrices | counted.convolutions
    # In bf16, the draw of the gates stays fp32.
    assert set(found) == {precision} if precision == "tf32" else found["bf16"] > found["fp32"] > 0
    state = state_of(store.partial("a"))
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in state.values())


@pytest.mark.parametrize("samples", [2, 3])
def test_a_search_in_parts_draws_the_gates_of_the_whole_batch(store: Store, samples: int) -> None:
    run_search(store.partial("whole"))
    run_search(store.partial("parts"), recipe=RECIPE.model_copy(update={"micro_batch": samples}))
    parts, whole = (state_of(store.partial(key)) for key in ("parts", "whole"))
    torch.testing.assert_close(parts["course"], whole["course"], rtol=0, atol=1e-3)


def set_up(**settings: bool) -> GatedRootstock:
    gated = make_gated()
    set_up_blocks(gated.model, RECIPE.model_copy(update=settings))
    return gated


def test_gated_blocks_that_keep_no_activations_end_in_the_same_bits(store: Store) -> None:
    run_search(store.partial("kept"))
    run_search(store.partial("again"), make=lambda _: set_up(checkpointing=True))
    assert_same_bits(state_of(store.partial("again")), state_of(store.partial("kept")))


def test_gated_blocks_may_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Module.compile  # without a C++ compiler
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    outcomes = []
    for gated in (make_gated(), set_up(compile=True)):
        engine = SearchEngine(gated, RECIPE, 0, None)
        x, t, y, _ = draw_batch(make_data(), RECIPE, 0, "search", 0, rank=0, workers=1)
        outcomes.append(engine(x, t, y))
        outcomes[-1].square().mean().backward()
        gradient = gated.gates.logits.grad
        assert gradient is not None
        outcomes.append(gradient)
    torch.testing.assert_close(outcomes[2:], outcomes[:2], rtol=1e-4, atol=1e-6)


def test_the_gates_of_a_step_are_drawn_for_the_step_at_its_temperature_and_scale(store: Store) -> None:
    seen: list[tuple[Tensor, float, float]] = []

    class Watched(SearchEngine):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            note = noting(lambda *drawn: seen.append(drawn), self.gated.draw)
            self.gated.draw = note  # type: ignore[method-assign]

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
        engine.step(loss_of(engine, 8, torch.randn(8, 1, 8, 8)), 1e-3)
        moved[rate] = {
            name: (value - old).abs().max().item()
            for name, value, old in zip(engine.names, engine.weights, before, strict=True)
        }
    # Adam's first step is as long as the rate.
    assert moved[1.0]["gates.logits"] == pytest.approx(1e-3, rel=1e-3)
    assert moved[10.0]["gates.logits"] == pytest.approx(1e-2, rel=1e-3)
    scion = "model.blocks.1.attn.scions.0.in_proj.weight"
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
    return [shuffled(30, step * RECIPE.batch, RECIPE.batch, 0, "search").tolist() for step in range(steps)]


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
    latents_of(data)[17] = math.nan
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
    latents_of(data)[17] = math.nan
    run_search(store.partial("fine"), data)
    monkeypatch.setattr(training, "POINTS", 1)
    run_search(store.partial("coarse"), data)
    fine, coarse = (final_state(store.partial(key))[1] for key in ("fine", "coarse"))
    ((step, loss),) = coarse
    assert step == 12.0
    assert loss == pytest.approx(sum(each for _, each in fine) / len(fine), rel=1e-5)


def test_steps_that_stay_no_numbers_stop_the_search(store: Store) -> None:
    data = make_data()
    latents_of(data)[:] = math.nan
    with pytest.raises(FloatingPointError, match=r"in 3 steps in a row, up to step 3;"):
        run_search(store.partial("a"), data)


def test_a_search_can_begin_with_a_skipped_step_and_a_checkpoint(store: Store) -> None:
    data = make_data()
    for sample in first_seen(data, 1)[0][:1]:
        latents_of(data)[sample] = math.nan
    recipe = RECIPE.model_copy(update={"checkpoint_every": 1})
    with pytest.raises(Killed):
        run_search(store.partial("killed"), data, recipe, Reports(dies_at=2))
    run_search(store.partial("killed"), data, recipe, weights=99)
    run_search(store.partial("straight"), data, recipe)
    assert_same_bits(state_of(store.partial("killed")), state_of(store.partial("straight")))


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_is_skipped_whichever_of_loss_and_gradient_is_no_number(spoilt: str) -> None:
    engine = SearchEngine(make_gated(), RECIPE, 0, None)
    loss = loss_of(engine, 8, torch.randn(8, 1, 8, 8))
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
    latents_of(data)[17] = math.nan
    for make in (make_gated, make_budgeted):
        run_search(Store(f"{folder}/store").partial(f"two {make.__name__}"), data, make=make)
    engine = SearchEngine(make_gated(), RECIPE, 0, None)
    loss = loss_of(engine, 4, torch.zeros(4, 1, 8, 8))
    made = engine.step(loss + (math.inf if rank == 0 else 0.0), 1e-3)  # the gradient is a number on both
    Path(folder, f"made{rank}.json").write_text(json.dumps(made))
    dist.destroy_process_group()


def test_two_workers_end_where_one_does_up_to_rounding_and_agree_on_what_to_skip(tmp_path: Path) -> None:
    workers = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)], cwd=Path(__file__).parents[1])
    store, data = Store(str(tmp_path / "store")), make_data()
    latents_of(data)[17] = math.nan
    for make in (make_gated, make_budgeted):
        run_search(store.partial(f"one {make.__name__}"), data, make=make)
    assert workers.wait(timeout=300) == 0
    for make in (make_gated, make_budgeted):
        one, two = (state_of(store.partial(f"{count} {make.__name__}")) for count in ("one", "two"))
        assert one["counts"].tolist() == two["counts"].tolist() and one["counts"][1] > 0
        for state in (one, two):
            state["progress"] = small.progress(state["progress"])
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert [json.loads((tmp_path / f"made{rank}.json").read_text()) for rank in (0, 1)] == [False, False]


# -- the step as a whole


CARRIED = Edit(site=Site(block=3, target="mlp"), operator=Mlp(ratio=2))


def make_context(
    folder: Path,
    store: Store,
    report: Reports | None = None,
    candidates: Sequence[Edit] = tuple(map(edit_at, SITES)),
    budget: float | None = None,
    **changes: Any,
) -> Context:
    """A search step over a rootstock that carries an edit already."""
    names = ("features", "base", *(f"scions/{edit.name}" for edit in candidates))
    inputs = {name: Folder(name, folder / name) for name in names}
    (folder / "out").mkdir(parents=True)
    for made in inputs.values():
        made.place.mkdir(parents=True)
    data, model = make_data(), lively(graft(DiT(TINY), [CARRIED], 0))
    np.save(folder / "features" / "training_latents.npy", latents_of(data).numpy())
    np.save(folder / "features" / "training_labels.npy", data.condition.require("labels").numpy())
    meta = LatentsMeta(codec="pixel", shape=(1, 8, 8), classes=("a", "b", "c"), num_training=30, num_heldout=0)
    write_meta(folder / "features", meta)
    checkpoints.save(model, (CARRIED,), folder / "base")
    for edit in candidates:
        scion = lively(new_scion(model, edit, 0), edit.site.block)
        save_file(scion.state_dict(), inputs[f"scions/{edit.name}"].path() / "scion.safetensors")
    return Context(
        step="search/0",
        params=SearchParams(
            seed=0,
            candidates=tuple(candidates),
            groups=GROUPS if budget is None else (),
            budget=budget,
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


# -- a budget


def cost_table(candidates: Sequence[Edit], config: DiTConfig = TINY) -> tuple[int, dict[int, tuple[int, ...]]]:
    """FLOPs of the rootstock, and by block of what its site may hold, as torch counts them."""
    bare = forward_flops(DiT(config))
    sites: dict[int, tuple[int, ...]] = {}
    original = ORIGINALS[candidates[0].site.target].flops(config.place)
    for edit in candidates:
        grafted = forward_flops(graft(DiT(config), [edit], 0))
        sites[edit.site.block] = (*sites.get(edit.site.block, (original,)), original + grafted - bare)
    return bare, sites


def test_what_sites_may_hold_costs_what_torch_counts() -> None:
    budget = budget_of(0.8, TINY, (), CHOICES)
    assert (budget.rootstock, dict(budget.sites)) == cost_table(CHOICES)


def test_where_weights_carry_edits_the_originals_are_what_stands() -> None:
    carried = (CARRIED, Edit(site=Site(block=1, target="mlp"), operator=Mlp(ratio=1)), edit_at(SITES[0]))
    budget = budget_of(0.9, TINY, carried, CHOICES)
    assert budget.rootstock == forward_flops(graft(DiT(TINY), carried, 0))
    bare = budget_of(0.8, TINY, (), CHOICES)
    held = {block: costs[0] for block, costs in budget.sites.items()}
    assert held == {0: bare.sites[0][0], 1: bare.sites[1][2], 2: bare.sites[2][0], 3: bare.sites[3][1]}


def random_budget(draws: random.Random) -> tuple[Budget, dict[int, list[float]]]:
    """Up to five sites of up to four holdings, alike or not, and scores of each."""
    alike = [draws.randrange(1, 30) for _ in range(draws.randrange(2, 5))]
    sites = {
        block: tuple(alike) if draws.random() < 0.5 else tuple(draws.randrange(1, 30) for _ in alike)
        for block in draws.sample(range(20), draws.randrange(1, 6))
    }
    rootstock = draws.randrange(20) + sum(costs[0] for costs in sites.values())
    scores = {block: [draws.gauss(0, 1) for _ in costs] for block, costs in sites.items()}
    return Budget(draws.uniform(0.4, 1.2), rootstock, sites), scores


def test_the_choice_is_the_best_of_all_that_meet_the_budget() -> None:
    draws, met, binding = random.Random(0), 0, 0
    for _ in range(400):
        budget, scores = random_budget(draws)
        everything = [
            dict(zip(budget.sites, holds, strict=True))
            for holds in itertools.product(*(range(len(costs)) for costs in budget.sites.values()))
        ]
        fitting = [
            holds for holds in everything if abs(budget.flops(holds) / budget.rootstock / budget.share - 1) <= 0.02
        ]
        if not fitting:
            with pytest.raises(ValueError, match="no choice of operators comes within 2% of"):
                budget.best(scores)
            continue

        def score(holds: dict[int, int], scores: dict[int, list[float]] = scores) -> float:
            return sum(scores[block][holding] for block, holding in holds.items())

        assert budget.best(scores) == max(fitting, key=score)
        met += 1
        binding += max(fitting, key=score) != max(everything, key=score)
    assert met > 100 and binding > 50


def test_the_choice_for_a_large_model_takes_well_under_a_second() -> None:
    config = DiTConfig(input_size=32, in_channels=4, patch=2, depth=28, width=1152, heads=16, num_classes=1000)
    operators = (Mlp(ratio=1), Mlp(ratio=2.3), Mlp(ratio=3.1), MlpHyenaX())
    candidates = [
        Edit(site=Site(block=block, target="mlp"), operator=operator, option=option)
        for block in range(28)
        for option, operator in enumerate(operators)
    ]
    began = time.process_time()
    budget_of(0.8, config, (), candidates)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("share", [0.65, 0.8, 0.95])
@pytest.mark.parametrize("carried", [(), (Edit(site=Site(block=1, target="mlp"), operator=Mlp(ratio=3)),)], ids=str)
def test_the_merged_model_is_measured_within_2_percent_of_the_budget(share: float, carried: tuple[Edit, ...]) -> None:
    rootstock = forward_flops(graft(DiT(TINY), carried, 0))
    chosen = set()
    for seed in range(6):
        gated = make_budgeted(share=share, carried=carried)
        with torch.no_grad():
            gated.gates.logits.normal_(generator=torch.Generator().manual_seed(seed))
        holds = gated.choice()
        chosen.add(tuple(holds.values()))
        measured = forward_flops(gated.merge())
        assert measured / rootstock == pytest.approx(share, rel=0.02)
        assert measured == budget_of(share, TINY, carried, CHOICES).flops({s.block: holds[s] for s in holds})
    assert len(chosen) > 1  # the gates, too, have a say


def test_a_budget_may_leave_sites_without_an_operator() -> None:
    operators: tuple[Operator, ...] = (Mlp(ratio=3), NoOperator())
    sites = [Site(block=block, target="mlp") for block in range(4)]
    candidates = [Edit(site=s, operator=one, option=option) for s in sites for option, one in enumerate(operators)]
    assert dict(budget_of(0.7, TINY, (), candidates).sites) == cost_table(candidates)[1]
    gated = make_budgeted(share=0.7, candidates=candidates)
    gated.draw(torch.zeros(5, 12), 1.0, 1.0)
    gated(*make_batch()).square().sum().backward()
    assert gated.gates.logits.grad is not None and gated.gates.logits.grad.ne(0).all()
    holds = gated.choice()
    assert 2 in holds.values()
    assert forward_flops(gated.merge()) / forward_flops(DiT(TINY)) == pytest.approx(0.7, rel=0.02)


def test_a_budget_that_nothing_can_meet_on_these_weights_is_refused() -> None:
    cheap = [Edit(site=edit.site, operator=Mlp(ratio=1)) for edit in CHOICES]
    budget_of(0.66, TINY, (), CHOICES)
    with pytest.raises(ValueError, match=r"no choice of operators comes within 2% of 0\.66 of the rootstock's FLOPs"):
        budget_of(0.66, TINY, cheap, CHOICES)


def test_a_gate_of_a_site_draws_each_holding_as_often_as_its_softmax_says() -> None:
    gates, batch = Gates([Gate.of_site(5, 2), Gate.of_site(7, 2)], 0.0), 40_000
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([0.00, 0.01, 0.02, 0.02, 0.00, -0.01]))
    drawn = gates.sample(gumbel(batch, 6, torch.Generator().manual_seed(0)), 0.5, 100.0)
    for block, expected in zip((5, 7), gates.probabilities(100.0), strict=True):
        assert drawn[block].shape == (batch, 3) and set(drawn[block].unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(drawn[block].mean(0), expected, rtol=0, atol=4 * (0.25 / batch) ** 0.5)


def test_the_expected_cost_is_the_mean_cost_of_what_is_drawn() -> None:
    gated = stir(make_budgeted())
    assert gated.budget is not None
    drawn = gated.gates.sample(gumbel(4000, 16, torch.Generator().manual_seed(0)), 1.0, 10.0)
    holds = [{block: int(drawn[block][example].argmax()) for block in drawn} for example in range(4000)]
    mean = sum(gated.budget.flops(one) for one in holds) / len(holds) / gated.budget.rootstock
    expected = gated.budget.expected_share(gated.gates.probabilities(10.0))
    assert expected.item() == pytest.approx(mean, abs=0.005) and abs(mean - 1) > 0.1


def test_the_penalty_is_the_squared_relative_miss_and_its_gradient_that_of_the_expected_cost() -> None:
    recipe = RECIPE.model_copy(update={"budget_weight": 3.0, "logit_scale": (2.0, 24.0)})
    engine = SearchEngine(stir(make_budgeted(share=0.8)), recipe, 0, None)
    engine.done = 4
    logits, scale = engine.gated.gates.logits, 2.0 + 22.0 * 4 / 11
    rootstock, sites = cost_table(CHOICES)

    def penalty(values: Tensor) -> float:
        shares = (scale * values.double().reshape(4, 4)).softmax(1)
        costs = torch.tensor([sites[block] for block in range(4)], dtype=torch.float64)
        expected = rootstock + (shares * costs).sum() - costs[:, 0].sum()
        return 3.0 * ((expected / (0.8 * rootstock)).item() - 1) ** 2

    found = engine.penalty()
    assert isinstance(found, Tensor) and found.item() == pytest.approx(penalty(logits.detach()), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, logits)
    steps = 1e-4 * torch.eye(16, dtype=torch.float64)
    values = logits.detach().double()
    differences = [(penalty(values + step) - penalty(values - step)) / 2e-4 for step in steps]
    torch.testing.assert_close(gradient.tolist(), differences, rtol=1e-2, atol=1e-5)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("share", [0.65, 0.8, 0.95])
def test_where_the_loss_has_no_say_the_expected_cost_goes_to_the_budget(share: float) -> None:
    engine = SearchEngine(make_budgeted(share=share), RECIPE.model_copy(update={"ema": 0.0}), 0, None)
    budget, gates = engine.gated.budget, engine.gated.gates
    assert budget is not None
    before = budget.expected_share(gates.probabilities(100.0)).item()
    assert abs(before / share - 1) > 0.02
    for _ in range(100):
        engine.step(torch.stack([value.sum() * 0 for value in engine.weights]).sum(), 1e-4)
    assert budget.expected_share(gates.probabilities(100.0)).item() == pytest.approx(share, rel=0.01)


def test_without_a_budget_there_is_no_penalty() -> None:
    assert SearchEngine(make_gated(), RECIPE, 0, None).penalty() == 0


@pytest.mark.parametrize("seed", range(4))
def test_under_a_budget_too_the_merged_model_does_what_the_gated_one_does_under_the_choice(seed: int) -> None:
    gated, batch = stir(make_budgeted(seed)), make_batch()
    with torch.no_grad():
        gated.gates.logits.normal_(generator=torch.Generator().manual_seed(seed))
    holds = gated.choice()
    noise = torch.full((5, 16), -1e6)
    for number, holding in enumerate(holds.values()):
        noise[:, 4 * number + holding] = 0.0
    gated.draw(noise, 1.0, 1.0)
    expected = gated(*batch)
    assert len(set(holds.values())) > 1
    model = gated.merge()
    made = [edit for edit in CHOICES if holds[edit.site] == edit.option + 1]
    assert model.state_dict().keys() == graft(DiT(TINY), made, 0).state_dict().keys()
    torch.testing.assert_close(model(*batch), expected, rtol=1e-5, atol=1e-5)


def test_each_example_passes_the_scion_that_its_gate_drew() -> None:
    site = CHOICES[0].site
    gated, batch = make_budgeted(candidates=CHOICES[:3], share=0.92), make_batch(4)
    scions = scions_at(gated, site)
    gated.draw(50 * torch.eye(4), 1.0, 1.0)
    together = gated(*batch)
    for holding in range(4):
        alone = tuple(part[holding : holding + 1] for part in batch)
        plain = plain_model({site: scions[holding - 1]} if holding else {})
        torch.testing.assert_close(together[holding : holding + 1], plain(*alone), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_ray")
def test_a_search_under_a_budget_leaves_what_each_site_holds_and_what_that_costs(tmp_path: Path, store: Store) -> None:
    context = make_context(tmp_path / "step", store, candidates=CHOICES, budget=0.75)
    search.run(context)
    found, read = json.loads((context.out / "search.json").read_text()), read_search(context.out)
    names = ["original", "mlp ratio=2.0", "mlp ratio=1.0", "mlp_hyena_x ratio=1"]
    assert [site["block"] for site in found["sites"]] == [0, 1, 2, 3] and found["groups"] == []
    for site in found["sites"]:
        block, probabilities = site["block"], dict(zip(names, site["probabilities"], strict=True))
        assert site["options"] == names and sum(probabilities.values()) == pytest.approx(1)
        assert site["confidence"] == probabilities[site["chosen"]] == read.confidence(block)
        assert site["decided"] == (site["confidence"] >= 0.5)
        replaced = [option for option in range(3) if read.replaces(block, option)]
        assert replaced == ([] if site["chosen"] == "original" else [names.index(site["chosen"]) - 1])
    assert found["chosen"] == [site["block"] for site in found["sites"] if site["chosen"] != "original"] != []
    assert len(set(read.options.values())) > 1  # so that it matters which
    assert len(found["warnings"]) == sum(not site["decided"] for site in found["sites"])

    model, edits = checkpoints.load(context.out / "hybrid")
    made = tuple(edit for edit in CHOICES if read.replaces(edit.site.block, edit.option))
    assert edits == (*made, *(() if 3 in read.chosen else (CARRIED,)))
    rootstock, _ = checkpoints.load(context.input("base"))
    assert found["flops"] == forward_flops(model) and found["budget"] == 0.75
    assert found["share"] == forward_flops(model) / forward_flops(rootstock) == pytest.approx(0.75, rel=0.02)

    rows = {name: list(csv.reader((context.out / f"{name}.csv").open())) for name in ("course", "cost")}
    assert rows["course"][0] == ["step", *(f"block {block} {name}" for block in range(4) for name in names)]
    last = [value for site in found["sites"] for value in site["probabilities"]]
    assert [float(value) for value in rows["course"][-1][1:]] == pytest.approx(last)
    assert [float(row[0]) for row in rows["cost"][1:]] == list(range(13))
    gated, _ = search.build(context)
    assert gated.budget is not None
    expected = gated.budget.expected_share(torch.tensor(last).split(4)).item()
    assert float(rows["cost"][-1][1]) == pytest.approx(expected)
    assert {path.name for path in context.out.glob("*.png")} == {"course.png", "cost.png", "loss.png"}


def test_a_site_whose_choice_is_not_likely_is_warned_of() -> None:
    gated = make_budgeted(candidates=CHOICES[:6], share=0.9)
    with torch.no_grad():
        gated.gates.logits.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0]))
    params = SearchParams(seed=0, candidates=CHOICES[:6], groups=(), budget=0.9, recipe=RECIPE)
    learned = search.outcome(gated, params, skipped=0)
    assert learned.chosen == (0,) and dict(learned.options) == {0: 1}
    assert [site.decided for site in learned.sites] == [False, True]
    (line,) = learned.warnings
    assert line.startswith("the site of block 0 did not decide: the choice, mlp ratio=1.0, has a probability of 0.00 ")
    assert line.endswith("; the budget has no room for mlp ratio=2.0, which has 1.00")


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
            model.initialise()
        return PlainEngine(model, clip=1.0, state=state)

    train(make_engine, planted_data(), recipe, seed=0, stream="base", partial=partial, report=Reports())
    state, curve = final_state(partial)
    assert curve[-1][1] < 0.6 * curve[0][1]
    return {name.removeprefix("weights/"): value for name, value in state.items() if name.startswith("weights/")}


def planted_data() -> TrainingSet:
    """One image a class."""
    draws = torch.Generator().manual_seed(4)
    images = torch.randn(3, 1, 8, 8, generator=draws).sign()
    numbers = torch.arange(60) % 3
    return TrainingSet(images[numbers], Condition(labels=numbers), TINY.conditioner, TINY.objective, CPU)


def search_planted(
    rootstock: Mapping[str, Tensor],
    store: Store,
    seed: int,
    candidates: Sequence[Edit],
    harmless: Mapping[int, int],
    groups: Sequence[Group] = (),
    budget: float | None = None,
) -> search.Learned:
    """What the gates find where all scions are garbage but a copy of the original at some blocks' option."""

    def make_engine(state: Mapping[str, Tensor] | None) -> SearchEngine:
        model, copies = DiT(PLANTED), DiT(PLANTED)
        for one in (model, copies):
            one.load_state_dict(rootstock, strict=False)
        scions: dict[Site, list[nn.Module]] = {}
        for edit in candidates:
            copied = harmless.get(edit.site.block) == edit.option
            scion = scion_at(copies, edit.site) if copied else Garbage(edit.site.block)
            scions.setdefault(edit.site, []).append(scion)
        gates = [*map(Gate.of_group, groups)] or [Gate.of_site(site.block, len(own)) for site, own in scions.items()]
        limit = None if budget is None else budget_of(budget, PLANTED, (), candidates)
        gated = GatedRootstock(model, scions, gates, limit, lora_rank=2, lora_alpha=4.0, seed=seed)
        return engines.setdefault("engine", SearchEngine(gated, PLANTED_RECIPE, seed, state))

    engines: dict[str, SearchEngine] = {}
    partial = store.partial("planted")
    train(make_engine, planted_data(), PLANTED_RECIPE, seed=seed, stream="search", partial=partial, report=Reports())
    gated = engines["engine"].gated
    with torch.no_grad():
        gated.gates.logits.copy_(final_state(partial)[0]["ema/gates.logits"])
    params = SearchParams(
        seed=seed, candidates=tuple(candidates), groups=tuple(groups), budget=budget, recipe=PLANTED_RECIPE
    )
    return search.outcome(gated, params, skipped=0)


@pytest.mark.parametrize(("seed", "harmless"), [(1, (1, 2, 6, 7)), (2, (1, 3, 5, 6))])
def test_the_gates_find_the_sites_that_can_be_replaced(
    rootstock: dict[str, Tensor], store: Store, seed: int, harmless: tuple[int, ...]
) -> None:
    candidates = [edit_at(Site(block=block, target="mha")) for block in range(1, 8)]
    planted = dict.fromkeys(harmless, 0)
    learned = search_planted(rootstock, store, seed, candidates, planted, groups=PLANTED_GROUPS)
    assert learned.chosen == harmless
    assert [group.decided for group in learned.groups] == [True, True] and learned.warnings == ()
    assert all(group.confidence > 0.9 for group in learned.groups)


PLANTED_CHOICES = tuple(
    Edit(site=Site(block=block, target="mlp"), operator=Mlp(ratio=ratio), option=option)
    for block in range(8)
    for option, ratio in enumerate((2, 1))
)


@pytest.mark.parametrize(
    ("seed", "harmless"),
    [(2, {2: 0, 3: 0, 5: 1, 7: 0}), (3, {1: 1, 6: 0})],
    ids=str,
)
def test_under_a_budget_the_gates_find_which_operator_each_site_can_take(
    rootstock: dict[str, Tensor], store: Store, seed: int, harmless: dict[int, int]
) -> None:
    # As dear as the planted answer: there is no other that meets the budget and has no garbage.
    free = Budget(1.0, *cost_table(PLANTED_CHOICES, PLANTED))
    share = free.flops({block: 1 + harmless[block] if block in harmless else 0 for block in range(8)}) / free.rootstock
    learned = search_planted(rootstock, store, seed, PLANTED_CHOICES, harmless, budget=share)
    assert dict(learned.options) == harmless and learned.chosen == tuple(sorted(harmless))
    assert learned.share == pytest.approx(share) and learned.warnings == ()
    assert all(site.decided and site.confidence > 0.9 for site in learned.sites)


if __name__ == "__main__":
    start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
