"""`finetune.train`: which parameters learn, and what is left of LoRA in the model that comes of it."""

from __future__ import annotations

import pytest
import torch

from graftwork.models.lora import merge_lora
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.rootstocks.pixart import PixArtConfig
from graftwork.models.surgery import graft, scion_at
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaX, Mlp, NoOperator
from graftwork.specs.training import FinetuneSpec
from graftwork.stages.training.finetune import freeze
from tests.small import TINY, Batch, lively

PLAN = [
    Edit(site=Site(block=1, target="mha"), operator=HyenaX(kernel=4)),
    Edit(site=Site(block=2, target="mlp"), operator=Mlp(ratio=2)),
]


def frozen(asked: dict[str, object], model: Rootstock | None = None) -> Rootstock:
    """A graft of which is trained what the recipe says."""
    made = lively(graft(model or DiT(TINY), PLAN, 0))
    freeze(made, PLAN, FinetuneSpec.model_validate(asked), seed=0)
    return made


def learning(model: Rootstock) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def of_scions(model: Rootstock) -> set[str]:
    scions = {id(value) for edit in PLAN for value in scion_at(model, edit.site).parameters()}
    return {name for name, value in model.named_parameters() if id(value) in scions}


def test_all_is_trained_unless_the_recipe_says_otherwise() -> None:
    model = frozen({})
    assert learning(model) == {name for name, _ in model.named_parameters()}


def test_the_scions_of_the_plan_alone() -> None:
    model = frozen({"train": "scions"})
    assert learning(model) == of_scions(model) and len(of_scions(model)) > 4


def test_lora_on_all_else_and_the_scions_whole() -> None:
    model = frozen({"train": "lora", "lora": {"rank": 2}})
    lora = {name for name in learning(model) if ".lora_" in name}
    assert learning(model) == lora | of_scions(model) and not any(".lora_" in name for name in of_scions(model))
    assert {name.split(".")[1] for name in lora if name.startswith("blocks.")} == {"0", "1", "2", "3"}
    assert any(name.startswith("final_layer.linear.lora_A") for name in lora)


def test_lora_on_the_layers_that_are_named(batch: Batch) -> None:
    model = frozen({"train": "lora", "lora": {"rank": 2, "targets": ["attn.qkv", "fc2"]}})
    lora = {name.split(".lora_")[0] for name in learning(model) if ".lora_" in name}
    assert lora == {f"blocks.{block}.attn.qkv" for block in (0, 2, 3)} | {
        f"blocks.{block}.mlp.fc2" for block in (0, 1, 3)
    }


def test_names_of_no_layer_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"lora.targets: got \['to_q'\], endings of no .*; accepted: such as attn.qkv"):
        frozen({"train": "lora", "lora": {"targets": ["to_q"]}})


def test_the_model_that_comes_of_it_is_a_plain_one_that_computes_the_same(batch: Batch) -> None:
    model = frozen({"train": "lora", "lora": {"rank": 2}})
    plain = {name for name, _ in graft(DiT(TINY), PLAN, 0).named_parameters()}
    with torch.no_grad():
        before = model(*batch)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
        learned = model(*batch)
        merge_lora(model)
        torch.testing.assert_close(model(*batch), learned, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, learned)
    assert {name for name, _ in model.named_parameters()} == plain


def test_a_pair_is_trained_whole() -> None:
    pair = [Edit(site=Site(block=0, target="pair"), operator=Parallel())]
    model = graft(DiT(TINY), pair, 0)
    freeze(model, pair, FinetuneSpec(train="scions"), seed=0)
    assert {name.split(".")[1] for name in learning(model)} == {"0"}


def test_scions_alone_are_not_trained_where_none_has_parameters() -> None:
    plan = [Edit(site=Site(block=1, target="mha"), operator=NoOperator())]
    with pytest.raises(ValueError, match=r"^finetune.train: got 'scions', and no scion of the plan .*: all, lora$"):
        freeze(graft(DiT(TINY), plan, 0), plan, FinetuneSpec(train="scions"), seed=0)


def test_a_pixart_has_lora_in_its_cross_attention_too() -> None:
    config = PixArtConfig(input_size=8, in_channels=3, patch=2, depth=4, width=16, heads=2, caption_channels=6)
    model = frozen({"train": "lora"}, new_rootstock(config))
    assert "blocks.1.cross_attn.kv_linear.lora_A.default.weight" in learning(model)


def test_settings_of_lora_without_it_are_refused() -> None:
    with pytest.raises(ValueError, match="train: lora beside it"):
        FinetuneSpec.model_validate({"lora": {"rank": 2}})
