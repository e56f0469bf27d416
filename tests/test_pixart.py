"""PixArt-Sigma: our module beside diffusers' on random weights, its files, and what can be grafted into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor

from graftwork.models import checkpoints
from graftwork.models.checkpoints import UnfitCheckpoint
from graftwork.models.checkpoints.layouts.diffusers_pixart import PIPELINE, rootstock_transformer
from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel
from graftwork.models.condition import Condition, TextConditioner
from graftwork.models.numerics.streams import SampleNoise
from graftwork.models.rootstocks import new_rootstock
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.rootstocks.pixart import Block, PixArt, PixArtConfig
from graftwork.models.sampling import sample
from graftwork.models.sampling.scheduled import new_scheduler
from graftwork.models.surgery import Observation, graft, observe
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import HyenaX, Mlp, NoOperator, Place
from graftwork.specs.rootstock import PixartModel
from graftwork.specs.sampler import SchedulerSampler
from tests.scenes import write_encoder
from tests.tiny_training import TINY, assert_same_bits
from tests.vaes import make_vae

CHANNELS, HEADS, CAPTION = 4, 3, 20
CARD = checkpoints.Card("title", "rootstock")


def theirs(sample_size: int = 8, interpolation: float | None = None, depth: int = 3) -> PixArtTransformer2DModel:
    """diffusers' model of a small width, with random weights that leave no path at zero."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=8,
        num_layers=depth,
        cross_attention_dim=8 * HEADS,
        sample_size=sample_size,
        caption_channels=CAPTION,
        interpolation_scale=interpolation,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def close(first: Tensor, second: Tensor) -> None:
    """As fp32 rounds, of outputs near 1."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def saved(model: PixArtTransformer2DModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def inputs(side: int = 8, length: int = 7, batch: int = 3) -> tuple[Tensor, Tensor, Condition]:
    """Latents, timesteps, and texts of different lengths in a batch."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(batch, CHANNELS, side, side, generator=draws)
    mask = (torch.arange(length)[None] < torch.tensor([[length], [max(1, length // 2)], [1]])[:batch]).long()
    text = torch.randn(batch, length, CAPTION, generator=draws)
    return x, torch.tensor([0, 500, 999])[:batch], Condition(text=text, mask=mask)


@torch.no_grad()
def output_of(model: PixArtTransformer2DModel, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    output: Tensor = model(
        x,
        encoder_hidden_states=condition.text,
        encoder_attention_mask=condition.mask,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output


@pytest.mark.parametrize(
    ("side", "interpolation"), [(8, 1.0), (8, None), (32, 0.5), (64, None), (128, None), (16, 0.25)], ids=str
)
def test_it_computes_what_diffusers_does(side: int, interpolation: float | None, tmp_path: Path) -> None:
    reference = theirs(side, interpolation, depth=2)
    model, edits = checkpoints.read(saved(reference, tmp_path))
    assert isinstance(model, PixArt) and edits == ()
    batch = inputs(side, batch=2)
    with torch.no_grad():
        close(model.eval()(*batch), output_of(reference, *batch))


def test_at_2048_pixels_positions_are_those_of_diffusers() -> None:
    """All other tensors do not know the size; a whole pass of 16,384 tokens takes minutes on a CPU."""
    model = new_rootstock(config(input_size=256, width=16, heads=2))
    reference = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=256
    )
    assert isinstance(model, PixArt) and model.config.stretch == 4
    torch.testing.assert_close(model.pos_embed, reference.pos_embed.pos_embed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 33, 300])
def test_a_text_may_have_any_length(length: int, tmp_path: Path) -> None:
    reference = theirs()
    model, _ = checkpoints.read(saved(reference, tmp_path))
    batch = inputs(length=length)
    with torch.no_grad():
        close(model.eval()(*batch), output_of(reference, *batch))


def test_what_fills_a_text_up_changes_nothing(tmp_path: Path) -> None:
    model, _ = checkpoints.read(saved(theirs(), tmp_path))
    x, t, condition = inputs()
    assert condition.text is not None and condition.mask is not None
    other = torch.where(condition.mask[..., None] == 1, condition.text, torch.full_like(condition.text, 9.0))
    with torch.no_grad():
        close(model.eval()(x, t, condition), model(x, t, Condition(text=other, mask=condition.mask)))
        unmasked = model(x, t, Condition(text=other))
    assert (unmasked - model(x, t, condition)).abs().max() > 1e-3


# -- files


def config(**changes: Any) -> PixArtConfig:
    fields = {"input_size": 8, "in_channels": CHANNELS, "patch": 2, "depth": 3, "width": 24, "heads": HEADS}
    return PixArtConfig(**{**fields, "caption_channels": CAPTION, **changes})


def lively(**changes: Any) -> PixArt:
    """A model with random weights that leave no path at zero."""
    torch.manual_seed(2)
    model = new_rootstock(config(**changes))
    assert isinstance(model, PixArt)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def original(model: PixArt, path: Path, **more: Tensor) -> Path:
    """A file as the original training script writes it: with the null caption beside the weights."""
    state = {**model.state_dict(), "y_embedder.y_embedding": torch.randn(300, CAPTION), **more}
    torch.save({"epoch": 1, "state_dict": state}, path)
    return path


def same(first: Any, second: Any) -> None:
    batch = inputs()
    with torch.no_grad():
        torch.testing.assert_close(first(*batch), second(*batch), rtol=0, atol=0)


def test_an_original_file_is_read(tmp_path: Path) -> None:
    model = lively()
    found, _ = checkpoints.read(original(model, tmp_path / "PixArt-Sigma-XL-2-256x256.pth"), heads=HEADS)
    assert found.config == model.config
    same(found.eval(), model)


def test_an_old_class_name_shards_and_a_whole_pipeline_are_read(tmp_path: Path) -> None:
    reference = theirs()
    folder = saved(reference, tmp_path / "pipeline" / "transformer", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    document = (folder / "config.json").read_text()
    (folder / "config.json").write_text(document.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    found, _ = checkpoints.read(tmp_path / "pipeline")
    plain, _ = checkpoints.read(saved(reference, tmp_path / "plain"))
    same(found.eval(), plain.eval())


def test_positions_that_are_stretched_otherwise_than_by_the_size_are_kept(tmp_path: Path) -> None:
    found, _ = checkpoints.read(saved(theirs(8, 3.0), tmp_path))
    assert isinstance(found, PixArt) and found.config.stretch == 3.0
    (tmp_path / "ours").mkdir()
    checkpoints.save(found, (), tmp_path / "ours")
    again, _ = checkpoints.read(tmp_path / "ours")
    assert isinstance(again, PixArt) and again.config == found.config
    same(again.eval(), found.eval())


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("use_additional_conditions", True, "use_additional_conditions is True, expected False"),
        ("activation_fn", "geglu", "activation_fn is 'geglu', expected 'gelu-approximate'"),
        ("interpolation_scale", "1", "interpolation_scale is '1', expected a number above 0"),
        ("attention_head_dim", 4, "has 3 heads of 4 channels, expected the 24 channels of its tensors"),
        ("norm_type", "layer_norm", "norm_type is 'layer_norm', expected 'ada_norm_single'"),
        ("sample_size", 0, "sample_size is 0, expected an integer of at least 1"),
    ],
)
def test_a_folder_with_other_settings_is_refused_in_one_line(
    setting: str, value: object, line: str, tmp_path: Path
) -> None:
    folder = saved(theirs(), tmp_path)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, setting: value}))
    with pytest.raises(UnfitCheckpoint, match=r"^[^\n]*$") as caught:
        checkpoints.read(folder)
    assert line in str(caught.value)


@pytest.mark.parametrize("name", ["PixArtMS_XL_2", "PixArt_XL_2", "PixArt-Sigma-XL-2-1024-MS", "PixArtSigmaPipeline"])
def test_a_file_may_be_called_what_its_authors_call_it(name: str, tmp_path: Path) -> None:
    model = lively()
    torch.save({"state_dict": model.state_dict(), "args": {"model": name}}, tmp_path / f"{name}.pth")
    same(checkpoints.read(tmp_path / f"{name}.pth", heads=HEADS)[0].eval(), model)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    same(checkpoints.read(original(model, tmp_path / "plain.pth"), heads=HEADS)[0].eval(), model)


@pytest.mark.parametrize(
    "said", [{"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}, {"use_flow": True}], ids=str
)
def test_a_pipeline_of_another_objective_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    saved(theirs(), tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "prediction_type": "epsilon"}
    document = tmp_path / "scheduler" / "scheduler_config.json"
    document.write_text(json.dumps(scheduler))
    checkpoints.read(tmp_path)
    document.write_text(json.dumps(scheduler | said))
    with pytest.raises(UnfitCheckpoint, match="another objective or model"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize("shape", [(), (64,), (1, 15, 24)], ids=str)
def test_positions_of_another_rank_or_no_square_are_one_line(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = original(lively(), tmp_path / "model.pth", pos_embed=torch.zeros(shape))
    with pytest.raises(UnfitCheckpoint, match=r"pos_embed: .*expected a square number of tokens"):
        checkpoints.read(path, heads=HEADS)


@pytest.mark.parametrize("number", ["200000", "9" * 5000], ids=["many", "more digits than Python reads"])
def test_a_block_of_a_large_number_is_refused_at_once(number: str, tmp_path: Path) -> None:
    saved(theirs(), tmp_path, safe_serialization=False)
    (file,) = tmp_path.glob("*.bin")
    torch.save({**torch.load(file), f"transformer_blocks.{number}.x": torch.ones(1)}, file)
    with pytest.raises(UnfitCheckpoint, match=f"has a block '{number[:9]}"):
        checkpoints.read(tmp_path)


def test_positions_that_diffusers_would_not_compute_are_exported_with_the_model(tmp_path: Path) -> None:
    """An original file has them as it was trained, whatever its size says."""
    other = lively(interpolation=1.0)
    model, _ = checkpoints.read(original(other, tmp_path / "model.pth"), heads=HEADS)
    same(model.eval(), other)
    checkpoints.export(tmp_path / "model.pth", tmp_path / "out", "diffusers", heads=HEADS)
    x, t, condition = inputs()
    transformer = GraftPixArtTransformer2DModel.from_pretrained(tmp_path / "out")
    close(output_of(transformer, x, t, condition), other(x, t, condition).detach())


@pytest.mark.parametrize("shape", [(8, 12), (4, 16)], ids=str)
def test_latents_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    x, t, condition = inputs()
    with pytest.raises(ValueError, match=r"accepted: .*to which its positions belong"):
        lively()(x.new_zeros(3, CHANNELS, *shape), t, condition)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("blocks.0.attn.q_norm.weight", "which normalises queries and keys"),
        ("blocks.1.attn.sr.weight", "which compresses keys and values"),
        ("csize_embedder.mlp.0.weight", "of PixArt-alpha"),
    ],
)
def test_relatives_are_refused_by_name(tensor: str, words: str, tmp_path: Path) -> None:
    path = original(lively(), tmp_path / "model.pth", **{tensor: torch.ones(3)})
    with pytest.raises(UnfitCheckpoint, match=words):
        checkpoints.read(path, heads=HEADS)


# -- grafts


EDITS = (
    Edit(site=Site(block=1, target="mha"), operator=HyenaX(kernel=3)),
    Edit(site=Site(block=2, target="mlp"), operator=Mlp(ratio=2)),
)
DROPPED = Edit(site=Site(block=1, target="mlp"), operator=NoOperator())


def test_a_graft_is_written_and_read_back(tmp_path: Path) -> None:
    model = graft(lively(), EDITS, seed=0).eval()
    checkpoints.save(model, EDITS, tmp_path)
    found, edits = checkpoints.read(tmp_path)
    assert edits == EDITS
    same(found.eval(), model)


def test_a_published_graft_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    model = graft(lively(), EDITS, seed=0).eval()
    found, edits = checkpoints.read(original(model, tmp_path / "graft.pth"), heads=HEADS)
    assert [edit.site for edit in edits] == [edit.site for edit in EDITS]
    same(found.eval(), model)


@pytest.mark.parametrize("made", [(), (*EDITS, DROPPED)], ids=["rootstock", "graft"])
def test_an_export_is_what_the_pipeline_of_diffusers_samples_from(made: tuple[Edit, ...], tmp_path: Path) -> None:
    """Its latents are ours, from the same noise by the same scheduler under the same guidance."""
    model = graft(lively(), made, seed=0).eval()
    checkpoints.save(model, made, tmp_path)
    checkpoints.export(tmp_path, tmp_path / "out", "diffusers", card=CARD)
    transformer = (GraftPixArtTransformer2DModel if made else PixArtTransformer2DModel).from_pretrained(
        tmp_path / "out"
    )
    x, t, condition = inputs()
    close(output_of(transformer, x, t, condition), model(x, t, condition).detach())
    same(checkpoints.read(tmp_path / "out")[0].eval(), model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert type(transformer).__name__ in card and "text-to-image" in card and "class-conditional" not in card

    empty = Condition(text=torch.randn(1, 7, CAPTION), mask=torch.tensor([[1, 1, 0, 0, 0, 0, 0]]))
    sampler = SchedulerSampler(name="dpmsolver++", steps=4, guidance=4.5, guided_channels="all")
    noise = SampleNoise(0, range(3), (CHANNELS, 8, 8), torch.device("cpu"))
    drawn = sample(
        model,
        condition,
        noise,
        sampler=sampler,
        conditioner=TextConditioner(CAPTION, empty),
        objective=model.config.objective,
        bounded=False,
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKL(latent_channels=CHANNELS),
        transformer=transformer,
        scheduler=new_scheduler(sampler, "epsilon", bounded=False),
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline.transformer) is type(transformer)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=condition.text,
        prompt_attention_mask=condition.mask,
        negative_prompt_embeds=empty.require("text").expand(3, -1, -1),
        negative_prompt_attention_mask=empty.require("mask").expand(3, -1),
        latents=SampleNoise(0, range(3), (CHANNELS, 8, 8), torch.device("cpu"))(),
        num_inference_steps=4,
        guidance_scale=4.5,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, as a repository has it."""
    from transformers import ByT5Tokenizer, T5EncoderModel

    folder = tmp_path_factory.mktemp("released")
    encoder = write_encoder(folder / "encoder")
    PixArtSigmaPipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(encoder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(encoder / "text_encoder"),
        vae=AutoencoderKL(latent_channels=CHANNELS),
        transformer=rootstock_transformer(lively()),
        scheduler=new_scheduler(SchedulerSampler(name="dpmsolver++", steps=4), "epsilon", bounded=False),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the code of a repository to a folder of the user's before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("made", [(), EDITS], ids=["rootstock", "graft"])
def test_a_whole_pipeline_is_loaded_by_the_code_beside_it_or_by_an_import(
    made: tuple[Edit, ...], released: Path, tmp_path: Path
) -> None:
    model = graft(lively(), made, seed=0).eval()
    checkpoints.save(model, made, tmp_path)
    out = tmp_path / "out"
    checkpoints.export(tmp_path, out, "diffusers", card=CARD, pipeline=released)
    card = (out / "README.md").read_text()
    assert ("trust_remote_code=True" in card) == bool(made) and "PixArtSigmaPipeline" in card
    if made:
        with pytest.raises(ValueError, match="trust_remote_code"):
            PixArtSigmaPipeline.from_pretrained(out)
        loaded = GraftPixArtTransformer2DModel.from_pretrained(out, subfolder="transformer")
        by_import = PixArtSigmaPipeline.from_pretrained(released, transformer=loaded)
    pipeline = PixArtSigmaPipeline.from_pretrained(out, trust_remote_code=bool(made))
    x, t, condition = inputs()
    for one in (pipeline, by_import) if made else (pipeline,):
        close(output_of(one.transformer, x, t, condition), model(x, t, condition).detach())
    rest = PixArtSigmaPipeline.from_pretrained(released)
    for part in ("text_encoder", "vae"):
        assert_same_bits(getattr(pipeline, part).state_dict(), getattr(rest, part).state_dict())
    same(checkpoints.read(out)[0].eval(), model)


@pytest.mark.usefixtures("own_modules")
def test_a_graft_alone_is_loaded_by_the_code_beside_it(tmp_path: Path) -> None:
    model = graft(lively(), EDITS, seed=0).eval()
    checkpoints.save(model, EDITS, tmp_path)
    checkpoints.export(tmp_path, tmp_path / "out", "diffusers", card=CARD)
    assert "AutoModel" in (tmp_path / "out" / "README.md").read_text()
    x, t, condition = inputs()
    loaded = AutoModel.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    close(output_of(loaded, x, t, condition), model(x, t, condition).detach())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"vae": "VAE"}, r"vae: got .* with a pixart; accepted: with a DiT only; of a pixart, give a pipeline"),
        ({"pipeline": "VAE"}, r"pipeline: .*: has no model_index.json, expected a PixArtSigmaPipeline"),
        ({"pipeline": "OTHER"}, r"pipeline: .*: is a 'DiTPipeline', expected a PixArtSigmaPipeline"),
        ({"pipeline": "PART"}, r"pipeline: .*: has no tokenizer and no vae, expected a whole PixArtSigmaPipeline"),
        (
            {"pipeline": "PART", "layout": "graftwork"},
            r"pipeline: .* layout graftwork; accepted: .*diffusers only",
        ),
        ({"pipeline": "PART", "adapters": "alone"}, r"pipeline: .* with adapters alone; accepted: with a model"),
    ],
    ids=str,
)
def test_what_no_pipeline_is_made_of_is_one_line(given: dict[str, str], line: str, tmp_path: Path) -> None:
    checkpoints.save(lively(), (), tmp_path)
    make_vae(tmp_path / "VAE")
    for name, kind, parts in (("OTHER", "DiTPipeline", ()), ("PART", PIPELINE, ("text_encoder", "scheduler"))):
        for part in parts:
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    options: dict[str, Any] = {key: str(tmp_path / value) if value.isupper() else value for key, value in given.items()}
    with pytest.raises(checkpoints.ExportRefused, match=line):
        checkpoints.export(tmp_path, tmp_path / "out", options.pop("layout", "diffusers"), **options)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_texts_is_not_made_of_a_dit(released: Path, tmp_path: Path) -> None:
    checkpoints.save(DiT(TINY), (), tmp_path)
    with pytest.raises(checkpoints.ExportRefused, match=r"with a dit; accepted: with a pixart only; of a dit, give a"):
        checkpoints.export(tmp_path, tmp_path / "out", "diffusers", pipeline=released)


def test_its_sites_are_self_attention_and_mlp_and_what_they_see_is_observed() -> None:
    model, batch = lively(), inputs()
    sites = [Site(block=0, target="mha"), Site(block=0, target="mlp")]
    with torch.no_grad():
        seen = observe(model, sites, *batch)
        stream = model.start(*batch)
        block = model.blocks[0]
        assert isinstance(block, Block)
        attention, mlp = (gated(seen[site]) for site in sites)
        attended = stream.tokens + attention
        crossed = attended + block.cross_attn(attended, *stream.conditioning[2:])
        close(crossed + mlp, model.through(0, stream).tokens)


def gated(observed: Observation) -> Tensor:
    assert observed.gate is not None
    return observed.gate[:, None] * observed.output


def test_the_released_model_costs_what_it_is_known_to() -> None:
    """Reference: 610,856,096 parameters in diffusers' layout, 52.4 TFLOP a pass at 2048 pixels."""
    model, at_2048 = PixartModel(size="XL/2"), Place(1152, 16, 16_384)
    cost = rootstock_cost(model, at_2048, 4, 0)
    assert cost.params == 610_856_096 and round(cost.flops / 1e12, 1) == 52.4


def test_parameters_and_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = lively()
    cost = rootstock_cost(model.config, model.config.place, CHANNELS, 0)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    x, t, condition = inputs(length=300, batch=1)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(x, t, condition)
    assert cost.flops == counted.get_total_flops()


# -- texts


def test_the_null_condition_is_the_empty_text_and_must_be_known() -> None:
    _, _, condition = inputs()
    with pytest.raises(ValueError, match="empty text"):
        TextConditioner(CAPTION).null(condition)
    empty = Condition(text=torch.full((1, 7, CAPTION), 5.0), mask=torch.tensor([[1, 0, 0, 0, 0, 0, 0]]))
    null = TextConditioner(CAPTION, empty).null(condition)
    assert null.text is not None and null.text.shape == (3, 7, CAPTION) and null.text.unique().tolist() == [5.0]
    dropped = TextConditioner(CAPTION, empty).drop(condition, torch.tensor([True, False, False]))
    assert dropped.mask is not None and dropped.mask.sum(1).tolist() == [1, 3, 1]


def test_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted: text"):
        lively()(inputs()[0], inputs()[1], torch.zeros(3, dtype=torch.long))
