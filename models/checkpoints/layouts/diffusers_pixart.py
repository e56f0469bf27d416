"""diffusers' PixArtTransformer2DModel, as PixArt-Sigma's repositories have it, also under its old class name.

Its tensors are the original's under other names, with queries, keys and values apart. The position embedding is not
among them: `sample_size` and `interpolation_scale` of config.json say what it is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import Made, Tensors
from graftwork.models.checkpoints.layouts.diffusers import count_of, positive_integer, weights_of
from graftwork.models.checkpoints.layouts.translation import translated
from graftwork.models.checkpoints.recognition import Found, rootstock_of
from graftwork.models.rootstocks.layers import waves_of_positions
from graftwork.models.rootstocks.pixart import PixArtConfig
from graftwork.specs.problems import shown

CLASS, NORM = "PixArtTransformer2DModel", "ada_norm_single"
# What else config.json may say, and what is computed here.
SETTINGS = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default", None),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
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
    return name == CLASS or (name == "Transformer2DModel" and config.get("norm_type") == NORM)


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
    sample_size = positive_integer(folder, config, "sample_size", 128)
    conditions = config.get("use_additional_conditions", sample_size == 128)
    if conditions is None:
        conditions = sample_size == 128
    for name, accepted in SETTINGS.items():
        value = conditions if name == "use_additional_conditions" else config.get(name, accepted[0])
        if value not in accepted:
            expected = f"expected {shown(accepted[0])}, as PixArt-Sigma has it"
            raise UnfitCheckpoint(f"{folder}: {name} is {shown(value)}, {expected}")
    stretch = _stretch(folder, config, sample_size)
    heads = positive_integer(folder, config, "num_attention_heads", 16)
    tensors = weights_of(folder)
    ours = _translated(tensors, sample_size, stretch)
    rootstock = rootstock_of(PixArtConfig, ours, heads)
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
