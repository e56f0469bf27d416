"""LoRA adapters of a finetuned graft: kept beside the weights that hold them, and exported as peft loads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from torch import Tensor, nn

from graftwork.models import checkpoints
from graftwork.models.checkpoints import Card, ExportRefused, export
from graftwork.models.checkpoints.adapters import FILE, keep_adapters
from graftwork.models.checkpoints.layouts.diffusers import rootstock_transformer
from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel
from graftwork.models.checkpoints.layouts.transformer import GraftTransformer2DModel
from graftwork.models.condition import Condition
from graftwork.models.lora import adapters_of, merge_lora
from graftwork.models.rootstocks import Rootstock, RootstockConfig, new_rootstock
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.rootstocks.pixart import PixArtConfig
from graftwork.models.surgery import graft
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.operators import HyenaX, Mlp
from graftwork.specs.training import FinetuneSpec
from graftwork.stages.training.finetune import freeze
from tests.small import TINY, lively
from tests.vaes import make_vae

IMAGENET = DiTConfig(**{**asdict(TINY), "num_classes": 1000})
PIXART = PixArtConfig(input_size=8, in_channels=4, patch=2, depth=3, width=24, heads=3, caption_channels=20)
GRAFTS = (
    Edit(site=Site(block=1, target="mha"), operator=HyenaX(kernel=4)),
    Edit(site=Site(block=2, target="mlp"), operator=Mlp(ratio=2)),
)
PAIR = (Edit(site=Site(block=0, target="pair"), operator=Parallel()),)
CARD = Card("title", "rootstock")


class Finetuned:
    """What a finetune by LoRA leaves in a folder, and the model as it was before its adapters were merged."""

    def __init__(self, folder: Path, config: RootstockConfig, plan: tuple[Edit, ...], **lora: object) -> None:
        self.folder, self.config = folder, config
        folder.mkdir()
        model = lively(graft(new_rootstock(config), plan, seed=0), scale=0.15).eval()
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        recipe = FinetuneSpec.model_validate({"train": "lora", "lora": {"rank": 2, "alpha": 3.0, **lora}})
        freeze(model, plan, recipe, seed=0)
        draws = torch.Generator().manual_seed(2)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.1, generator=draws)
        keep_adapters(adapters_of(model), [edit.site for edit in plan], folder)
        self.started = run(graft_with(self.before, config, plan), config)
        self.learned = run(model, config)
        assert not torch.allclose(self.started, self.learned, atol=1e-2)
        merge_lora(model)
        checkpoints.save(model, plan, folder)


def graft_with(state: dict[str, Tensor], config: RootstockConfig, plan: tuple[Edit, ...]) -> Rootstock:
    model = graft(new_rootstock(config), plan, seed=0).eval()
    model.load_state_dict(state)
    return model


def inputs(config: RootstockConfig) -> tuple[Tensor, Tensor, Condition]:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, 8, 8, generator=draws)
    if isinstance(config, PixArtConfig):
        mask = (torch.arange(7)[None] < torch.tensor([[7], [3], [1]])).long()
        condition = Condition(text=torch.randn(3, 7, config.caption_channels, generator=draws), mask=mask)
    else:
        condition = Condition(labels=torch.tensor([0, 3, 2]))
    return x, torch.tensor([0, 500, 999]), condition


@torch.no_grad()
def run(model: Any, config: RootstockConfig) -> Tensor:
    """Return the output of a model of ours, or of one with the interface of diffusers."""
    x, t, condition = inputs(config)
    output: Tensor
    if isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, Rootstock):
        output = model(x, t, condition)
    elif isinstance(config, PixArtConfig):
        sizes = {"resolution": None, "aspect_ratio": None}
        output = model(x, condition.text, t, sizes, encoder_attention_mask=condition.mask, return_dict=False)[0]
    else:
        output = model(x, timestep=t, class_labels=condition.labels, return_dict=False)[0]
    return output


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


# -- as peft loads them


@pytest.mark.parametrize(
    ("config", "plan"), [(TINY, GRAFTS), (TINY, PAIR), (PIXART, GRAFTS)], ids=["dit", "pair", "pixart"]
)
def test_beside_a_graft_they_make_the_finetuned_graft_in_diffusers(
    tmp_path: Path, config: RootstockConfig, plan: tuple[Edit, ...]
) -> None:
    made = Finetuned(tmp_path / "in", config, plan)
    export(made.folder, tmp_path / "out", "diffusers", adapters="beside")
    kind = GraftPixArtTransformer2DModel if config is PIXART else GraftTransformer2DModel
    transformer = kind.from_pretrained(tmp_path / "out")
    close(run(transformer, config), made.started)
    close(run(PeftModel.from_pretrained(transformer, tmp_path / "out" / "adapters"), config), made.learned)
    close(run(transformer, config), made.learned)  # in place


@pytest.mark.parametrize(
    ("config", "plan"), [(TINY, GRAFTS), (PIXART, GRAFTS), (PIXART, ())], ids=["dit", "pixart", "rootstock"]
)
def test_beside_ours_they_make_the_finetuned_graft(
    tmp_path: Path, config: RootstockConfig, plan: tuple[Edit, ...]
) -> None:
    made = Finetuned(tmp_path / "in", config, plan)
    export(made.folder, tmp_path / "out", "graftwork", adapters="beside")
    model, edits = checkpoints.read(tmp_path / "out")
    assert edits == plan
    close(run(model.eval(), config), made.started)
    close(run(PeftModel.from_pretrained(model, tmp_path / "out" / "adapters"), config), made.learned)


def test_alone_they_make_the_finetuned_pixart_of_diffusers_own_class(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", PIXART, ())
    checkpoints.save(graft_with(made.before, PIXART, ()), (), tmp_path)
    export(tmp_path, tmp_path / "rootstock", "diffusers")
    export(made.folder, tmp_path / "out", "diffusers", adapters="alone")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    transformer = PixArtTransformer2DModel.from_pretrained(tmp_path / "rootstock")
    close(run(transformer, PIXART), made.started)
    close(run(PeftModel.from_pretrained(transformer, tmp_path / "out"), PIXART), made.learned)


def test_alone_they_make_the_finetuned_dit_of_diffusers_own_class(tmp_path: Path) -> None:
    """Whose embedders each block has; it computes timesteps a little otherwise than ours, so that it is compared with
    itself, of the weights that hold the adapters."""
    made = Finetuned(tmp_path / "in", IMAGENET, ())
    export(made.folder, tmp_path / "out", "diffusers", adapters="alone")
    rootstock, merged = graft_with(made.before, IMAGENET, ()), checkpoints.load(made.folder)[0]
    assert isinstance(rootstock, DiT) and isinstance(merged, DiT)
    expected = run(rootstock_transformer(merged), IMAGENET)
    close(run(PeftModel.from_pretrained(rootstock_transformer(rootstock), tmp_path / "out"), IMAGENET), expected)


def test_alone_they_fit_the_rootstock_of_ours(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", TINY, ())
    export(made.folder, tmp_path / "out", "graftwork", adapters="alone")
    model = PeftModel.from_pretrained(graft_with(made.before, TINY, ()), tmp_path / "out")
    close(run(model, TINY), made.learned)


def test_layers_that_the_recipe_names_have_adapters_and_no_others(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", PIXART, (), targets=["cross_attn.kv_linear"], rank=3)
    export(made.folder, tmp_path / "out", "diffusers", adapters="alone")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    layers = [f"transformer_blocks.{block}.attn2.to_{kind}" for block in range(3) for kind in "kv"]
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (layers, 3, 3.0)


def test_a_pipeline_has_them_beside(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", TINY, GRAFTS)
    export(made.folder, tmp_path / "out", "diffusers", vae=make_vae(tmp_path / "vae"), adapters="beside")
    transformer = GraftTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    close(run(PeftModel.from_pretrained(transformer, tmp_path / "out" / "adapters"), TINY), made.learned)


@pytest.mark.parametrize("layout", ["graftwork", "diffusers", "pipeline"])
def test_what_a_card_says_to_run_loads_model_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    made = Finetuned(tmp_path / "in", TINY, GRAFTS)
    vae = make_vae(tmp_path / "vae") if layout == "pipeline" else None
    written: Any = "diffusers" if layout == "pipeline" else layout
    export(made.folder, tmp_path / "out", written, card=CARD, vae=vae, adapters="beside")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec((tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0], scope)
    model = scope["model"].transformer if layout == "pipeline" else scope["model"]
    close(run(model.eval(), TINY), made.learned)


@pytest.mark.parametrize("layout", ["graftwork", "diffusers"])
def test_a_card_of_adapters_alone_says_for_which_model_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    made = Finetuned(tmp_path / "in", PIXART, ())
    export(made.folder, tmp_path / "out", layout, card=CARD, adapters="alone")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("graftwork.load" if layout == "graftwork" else "PixArtTransformer2DModel") in text
    rootstock = tmp_path / "rootstock"
    rootstock.mkdir()
    checkpoints.save(graft_with(made.before, PIXART, ()), (), rootstock)
    export(rootstock, tmp_path / "theirs", layout)
    model: Any = checkpoints.read(tmp_path / "theirs")[0]
    if layout == "diffusers":
        model = PixArtTransformer2DModel.from_pretrained(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    exec(text.split("```python\n")[1].split("```")[0], {"model": model})
    close(run(model.eval(), PIXART), made.learned)


# -- in the store, and what is refused


def test_a_model_with_adapters_beside_is_read_as_before(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", TINY, GRAFTS)
    close(run(checkpoints.read(made.folder)[0].eval(), TINY), made.learned)
    export(made.folder, tmp_path / "out", "graftwork")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    close(run(checkpoints.read(tmp_path / "out")[0].eval(), TINY), made.learned)


def test_the_same_adapters_are_the_same_bytes(tmp_path: Path) -> None:
    """In the artifact, whose digest stands in the manifest, and as they are exported."""
    for name in ("a", "b"):
        made = Finetuned(tmp_path / name, TINY, GRAFTS)
        export(made.folder, tmp_path / f"out-{name}", "graftwork", adapters="beside")
    for file in (f"{{}}/{FILE}", "out-{}/adapters/adapter_config.json", "out-{}/adapters/adapter_model.safetensors"):
        assert (tmp_path / file.format("a")).read_bytes() == (tmp_path / file.format("b")).read_bytes()


@pytest.mark.parametrize(
    ("plan", "layout", "adapters", "said"),
    [
        (GRAFTS, "diffusers", "alone", "they belong with scions (01.mha, 02.mlp); accepted: beside, "),
        ((), "published", "beside", "with layout published, which has no names for them; accepted: with layout graft"),
        ((), "graftwork", "inside", "adapters: got 'inside'; accepted: beside, alone"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, plan: tuple[Edit, ...], layout: Any, adapters: Any, said: str
) -> None:
    made = Finetuned(tmp_path / "in", TINY, plan)
    with pytest.raises(ExportRefused) as caught:
        export(made.folder, tmp_path / "out", layout, adapters=adapters)
    assert said in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_without_adapters_is_one_line(tmp_path: Path) -> None:
    made = Finetuned(tmp_path / "in", TINY, GRAFTS)
    (made.folder / FILE).unlink()
    with pytest.raises(
        ExportRefused, match=r"adapters: got 'beside', and .*/in has none; accepted: a graft that was f"
    ):
        export(made.folder, tmp_path / "out", "diffusers", adapters="beside")
