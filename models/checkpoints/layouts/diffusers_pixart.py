"""diffusers' PixArtTransformer2DModel, as PixArt-Sigma's repositories have it, also under its old class name.

Its tensors are the original's under other names, with queries, keys and values apart. The position embedding is not
among them: `sample_size` and `interpolation_scale` of config.json say what it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.models.checkpoints.adapters import layers_by_tensors, renamed
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import Made, Tensors
from graftwork.models.checkpoints.fit import Uninitialised, shapes_of, weightless
from graftwork.models.checkpoints.layouts.diffusers import (
    count_of,
    find_wrapped,
    positive_integer,
    require_ours,
    weights_of,
)
from graftwork.models.checkpoints.layouts.translation import split, translated
from graftwork.models.checkpoints.recognition import Found, rootstock_of
from graftwork.models.lora import Adapters
from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.layers import waves_of_positions
from graftwork.models.rootstocks.pixart import PixArt, PixArtConfig
from graftwork.specs.edits import Edit
from graftwork.specs.problems import shown

if TYPE_CHECKING:
    from diffusers import ModelMixin, PixArtTransformer2DModel

    from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel

CLASS, NORM = "PixArtTransformer2DModel", "ada_norm_single"
PIPELINE, INDEX = "PixArtSigmaPipeline", "model_index.json"
COMPONENTS = ("tokenizer", "text_encoder", "vae", "scheduler")  # of a pipeline, beside its transformer
WRAPPED = "GraftPixArtTransformer2DModel"
# What else config.json may say, and what is computed here.
SETTINGS = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default", None),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "norm_type": (NORM,),
    "use_additional_conditions": (False, None),
}
# Names of modules outside the blocks, and within one: the original's, and diffusers'.
OUTSIDE = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "t_block.1": ["adaln_single.linear"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
    "final_layer.linear": ["proj_out"],
}
WITHIN = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "cross_attn.q_linear": ["attn2.to_q"],
    "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
    "cross_attn.proj": ["attn2.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}


def is_ours(config: dict[str, Any]) -> bool:
    """Return whether a config.json is of a PixArt: transformers had one class for all before that had its own."""
    name = config.get("_class_name")
    return name in (CLASS, WRAPPED) or (name == "Transformer2DModel" and config.get("norm_type") == NORM)


def names_of(depth: int) -> dict[str, list[str]]:
    """Return, for each tensor of a rootstock but `pos_embed`, those of diffusers' that it is made of, row upon row."""
    modules = {**OUTSIDE}
    tables = {"final_layer.scale_shift_table": ["scale_shift_table"]}
    for block in range(depth):
        modules |= {
            f"blocks.{block}.{ours}": [f"transformer_blocks.{block}.{name}" for name in theirs]
            for ours, theirs in WITHIN.items()
        }
        table = "scale_shift_table"
        tables[f"blocks.{block}.{table}"] = [f"transformer_blocks.{block}.{table}"]
    return tables | {
        f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def find(folder: Path, config: dict[str, Any]) -> Found:
    """Read a folder that `save_pretrained` wrote. Raise UnfitCheckpoint for settings unlike PixArt-Sigma's."""
    if config["_class_name"] == WRAPPED:
        return find_wrapped(folder, config, "pixart.")
    sample_size = positive_integer(folder, config, "sample_size", 128)
    conditions = config.get("use_additional_conditions", sample_size == 128)
    if conditions is None:
        conditions = sample_size == 128
    for name, accepted in SETTINGS.items():
        value = conditions if name == "use_additional_conditions" else config.get(name, accepted[0])
        if value not in accepted:
            expected = f"expected {shown(accepted[0])}, as PixArt-Sigma has it"
            raise UnfitCheckpoint(f"{folder}: {name} is {shown(value)}, {expected}")
    require_ours(folder, config)
    stretch = _stretch(folder, config, sample_size)
    heads = positive_integer(folder, config, "num_attention_heads", 16)
    tensors = weights_of(folder)
    ours = _translated(tensors, sample_size, stretch)
    rootstock = rootstock_of(PixArtConfig, ours, heads)
    channels = positive_integer(folder, config, "attention_head_dim", 72)
    if heads * channels != rootstock.width:
        width = f"{heads} heads of {channels} channels"
        raise UnfitCheckpoint(f"{folder}: has {width}, expected the {rootstock.width} channels of its tensors")
    return Found(ours, heads=heads, config=_with(rootstock, stretch))


def _with(config: PixArtConfig, stretch: float) -> PixArtConfig:
    """Return the config with its positions stretched as the file says, if that is not what its size says."""
    return config if config.stretch == stretch else replace(config, interpolation=stretch)


def _stretch(folder: Path, config: dict[str, Any], sample_size: int) -> float:
    """Return what positions are divided by: diffusers takes a whole number by the size if the config has none."""
    value = config.get("interpolation_scale")
    if value is None:
        return float(max(sample_size // 64, 1))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UnfitCheckpoint(f"{folder}: interpolation_scale is {shown(value)}, expected a number above 0")
    return float(value)


def _translated(tensors: Tensors, sample_size: int, stretch: float) -> Tensors:
    patches = tensors.shapes.get("pos_embed.proj.weight", ())
    made: dict[str, Made] = {}
    if len(patches) == 4 and patches[2]:
        side, width = sample_size // patches[2], patches[0]
        made["pos_embed"] = Made((1, side**2, width), lambda: waves_of_positions(side, width, stretch))
    names = names_of(count_of(tensors, re.compile(r"transformer_blocks\.(\d+)\.")))
    return translated(tensors, names, left_out={"pos_embed.pos_embed"}, made=made)


def takes(model: Rootstock) -> bool:
    """Return whether the model is of the family whose class in diffusers this is."""
    return isinstance(model, PixArt)


def wrapped(model: Rootstock, edits: Sequence[Edit]) -> PixArtTransformer2DModel | GraftPixArtTransformer2DModel:
    """Return what PixArtSigmaPipeline takes: diffusers' class if it computes the same, else ours.

    diffusers' has a rootstock's operators only, and computes the positions, which a file may have otherwise.
    """
    assert isinstance(model, PixArt)
    config = model.config
    positions = waves_of_positions(config.side, config.width, config.stretch)
    is_rootstock = shapes_of(model.state_dict()) == shapes_of(weightless(config, ()).state_dict())
    if is_rootstock and torch.allclose(model.pos_embed.float().cpu(), positions, rtol=0, atol=1e-6):
        return rootstock_transformer(model)
    from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel

    return GraftPixArtTransformer2DModel.around(model, edits)


def require_pipeline(folder: Path) -> None:
    """Raise UnfitCheckpoint for a folder that is not a whole PixArtSigmaPipeline."""
    if not (folder / INDEX).is_file():
        raise UnfitCheckpoint(f"{folder}: has no {INDEX}, expected a {PIPELINE}")
    name = json.loads((folder / INDEX).read_text()).get("_class_name")
    if name != PIPELINE:
        raise UnfitCheckpoint(f"{folder}: is a {shown(name)}, expected a {PIPELINE}")
    missing = [one for one in COMPONENTS if not (folder / one).is_dir()]
    if missing:
        raise UnfitCheckpoint(f"{folder}: has no {' and no '.join(missing)}, expected a whole {PIPELINE}")


def write_pipeline(transformer: ModelMixin, out: Path, pipeline: Path) -> None:
    """Write a PixArtSigmaPipeline: the transformer, with copies of all else from a pipeline that is there."""
    from graftwork.models.checkpoints.layouts.graft_model import CODE, GraftModel

    for component in COMPONENTS:
        shutil.copytree(pipeline / component, out / component)
    transformer.save_pretrained(out / "transformer")
    library = CODE if isinstance(transformer, GraftModel) else "diffusers"
    index = json.loads((pipeline / INDEX).read_text())
    index["transformer"] = [library, type(transformer).__name__]
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def rootstock_adapters(depth: int) -> Callable[[Adapters], Adapters]:
    """Return what names adapters by the layers of diffusers' model."""
    return lambda adapters: renamed(adapters, layers_by_tensors(names_of(depth)))


def rootstock_transformer(model: PixArt) -> PixArtTransformer2DModel:
    """Return diffusers' own model with a rootstock's tensors."""
    from diffusers import PixArtTransformer2DModel

    config = model.config
    with Uninitialised():
        transformer = PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            cross_attention_dim=config.width,
            sample_size=config.input_size,
            patch_size=config.patch,
            interpolation_scale=config.stretch,
            use_additional_conditions=False,
            caption_channels=config.caption_channels,
        )
    transformer.load_state_dict(split(model.state_dict(), names_of(config.depth)), assign=True)
    return transformer.eval()
