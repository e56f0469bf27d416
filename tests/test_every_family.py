"""What must work for whatever family a rootstock is of: a training that is resumed, a search, pairs of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.rootstocks import Rootstock, RootstockConfig, new_rootstock
from graftwork.models.rootstocks.dit import DiTConfig
from graftwork.models.rootstocks.parallel import ParallelBlock
from graftwork.models.rootstocks.pixart import PixArtConfig
from graftwork.models.rootstocks.sit import SiTConfig
from graftwork.models.selection.gates import Gate, GatedRootstock
from graftwork.models.surgery import graft, new_scion
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.layers.learned import Group
from graftwork.specs.operators import HyenaX, NoOperator
from graftwork.specs.training import SearchSpec, TrainingSpec
from graftwork.stages.contract import Partial
from graftwork.stages.selection.search import SearchEngine
from graftwork.stages.training.batches import TrainingSet
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import final_state, train
from tests.small import lively
from tests.tiny_training import RECIPE, Killed, Reports, assert_same_bits, state_of

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE: dict[str, Any] = {"input_size": 8, "in_channels": 1, "patch": 2, "depth": 4, "width": 16, "heads": 2}
CONFIGS: dict[str, RootstockConfig] = {
    "dit": DiTConfig(**SQUARE, num_classes=3),
    "sit": SiTConfig(**SQUARE, num_classes=3),
    "pixart": PixArtConfig(**SQUARE, caption_channels=6),
}
EDITS = [
    Edit(site=Site(block=1, target="mha"), operator=HyenaX(kernel=4)),
    Edit(site=Site(block=2, target="mha"), operator=NoOperator()),
]


class ThreeTexts:
    """Texts by their labels: three, and the empty one."""

    def __init__(self, config: RootstockConfig) -> None:
        self.states = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))
        self.conditioner = config.conditioner

    def __call__(self, condition: Condition) -> Condition:
        labels = condition.require("labels")
        return Condition(text=self.states[labels], mask=torch.ones(len(labels), 5))


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> RootstockConfig:
    return CONFIGS[request.param]


def model_of(config: RootstockConfig, seed: int = 0) -> Rootstock:
    model = lively(new_rootstock(config), seed, scale=0.2)
    if config.kind == "pixart":
        model.texts = ThreeTexts(config)  # type: ignore[assignment]
    return model


def data_of(config: RootstockConfig) -> TrainingSet:
    draws = torch.Generator().manual_seed(1)
    latents, labels = torch.randn(30, 1, 8, 8, generator=draws), torch.arange(30) % 3
    texts = model_of(config).texts
    return TrainingSet(
        latents, Condition(labels=labels), config.conditioner, config.objective, torch.device("cpu"), texts=texts
    )


def trained(config: RootstockConfig, partial: Partial, recipe: TrainingSpec, dies_at: int | None, seed: int) -> None:
    def make_engine(state: Mapping[str, Tensor] | None) -> PlainEngine:
        return PlainEngine(model_of(config, seed), clip=recipe.clip, ema=recipe.ema, state=state)

    report = Reports(dies_at)
    train(make_engine, data_of(config), recipe, seed=0, stream="base", partial=partial, report=report)


def test_a_training_that_was_killed_ends_in_the_same_bits(config: RootstockConfig, store: Store) -> None:
    trained(config, store.partial("straight"), RECIPE, None, seed=0)
    with pytest.raises(Killed):
        trained(config, store.partial("killed"), RECIPE, 7, seed=0)
    trained(config, store.partial("killed"), RECIPE, None, seed=99)  # all must come from the checkpoint
    assert_same_bits(state_of(store.partial("killed")), state_of(store.partial("straight")))


def test_gates_choose_and_the_choice_is_a_plain_model_again(config: RootstockConfig, store: Store) -> None:
    recipe = SearchSpec(steps=6, batch=8, lr=1e-3, warmup=0, ema=0.0, lora_rank=2)
    engines: list[SearchEngine] = []

    def make_engine(state: Mapping[str, Tensor] | None) -> SearchEngine:
        model = model_of(config)
        scions: dict[Site, list[nn.Module]] = {edit.site: [new_scion(model, edit, 0)] for edit in EDITS}
        gated = GatedRootstock(model, scions, [Gate.of_group(Group(blocks=(1, 2), keep=1, pinned=()))])
        engines.append(SearchEngine(gated, recipe, 0, state))
        return engines[-1]

    partial = store.partial("search")
    train(make_engine, data_of(config), recipe, seed=0, stream="search", partial=partial, report=Reports())
    state, _ = final_state(partial)
    assert state["counts"][1] == 0  # no step was skipped
    logits = engines[-1].gated.gates.logits
    assert logits.isfinite().all() and len(logits.unique()) > 1  # the gates learned something
    gated = engines[-1].gated
    chosen = {site for site, holding in gated.choice().items() if holding}
    merged = gated.merge()
    assert len(chosen) == 1
    expected = graft(new_rootstock(config), [edit for edit in EDITS if edit.site in chosen], 0)
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()
    }


def test_two_blocks_side_by_side_add_what_each_of_them_adds(config: RootstockConfig, tmp_path: Path) -> None:
    model, pair = model_of(config), Edit(site=Site(block=1, target="pair"), operator=Parallel())
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.7]), Condition(labels=torch.tensor([0, 2]))
    with torch.no_grad():
        before = model.through(0, model.start(*inputs))
        one, other = (model.through(index, before).tokens - before.tokens for index in (1, 2))
        graft(model, [pair], 0)
        both = model.through(2, model.through(1, before)).tokens
    assert isinstance(model.blocks[1], ParallelBlock)
    torch.testing.assert_close(both, before.tokens + one + other, rtol=1e-5, atol=1e-5)
    checkpoints.save(model, [pair], tmp_path)
    again, edits = checkpoints.load(tmp_path)
    again.texts = model.texts
    with torch.no_grad():
        assert list(edits) == [pair] and torch.equal(again(*inputs), model(*inputs))
