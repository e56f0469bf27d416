"""diffusers' DiTTransformer2DModel, and grafts as a model of the same interface. Only writing imports diffusers.

Its tensors are DiT's under other names: queries, keys and values apart, and the embedders of timestep and label once in
every block. What it computes differs from DiT in two things, and in no other (tests/test_checkpoints.py):

- Its timestep's sinusoids have frequencies 10000^(-i/127), where those of DiT, for which the weights were trained, are
  10000^(-i/128). No setting changes that: a rootstock in diffusers is not quite the DiT that it was. A graft is, since
  it goes there as a model of our own. (So does a rootstock of other classes than ImageNet's: for DiTPipeline the null
  class is 1000, whatever the model.)
- The norm before the feed-forward has an eps of `norm_eps`, 1e-5 unless the config says otherwise, where DiT has 1e-6.
  We write 1e-6, and compute with 1e-6 what we read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.models.checkpoints import statements
from graftwork.models.checkpoints.adapters import layers_by_tensors, renamed
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import Made, Tensors, read_index, read_tensors
from graftwork.models.checkpoints.fit import Uninitialised, shapes_of, weightless
from graftwork.models.checkpoints.layouts.translation import split, translated
from graftwork.models.checkpoints.recognition import Found, parse_description
from graftwork.models.checkpoints.wrappers import DIFFUSERS, unwrapped
from graftwork.models.lora import Adapters
from graftwork.models.objectives.gaussian import STEPS
from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.rootstocks.layers import waves_of_positions
from graftwork.specs.edits import Edit
from graftwork.specs.layers.strategy import MAX_DEPTH
from graftwork.specs.reading.load import shown

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, ModelMixin

    from graftwork.models.checkpoints.layouts.transformer import GraftTransformer2DModel

WRAPPED = "GraftTransformer2DModel"
CLASSES = (
    "DiTTransformer2DModel",
    "Transformer2DModel",
    WRAPPED,
)  # the second: DiTs converted before the first was there
MAX_DIGITS = 9  # of a block's number
CLASSES_OF_PIPELINE = 1000  # DiTPipeline: also the label of the null class
STEM = "diffusion_pytorch_model"
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.bin")

# Names of modules outside the blocks, and within one: ours, and diffusers'.
OUTSIDE = {
    "x_embedder.proj": ["pos_embed.proj"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}
WITHIN = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def parts(depth: int) -> dict[str, list[str]]:
    """For each tensor of a rootstock but `pos_embed`, the tensors of diffusers' that it is made of, row upon row."""
    modules = {**OUTSIDE}
    for i in range(depth):
        modules |= {
            f"blocks.{i}.{ours}": [f"transformer_blocks.{i}.{m}" for m in theirs] for ours, theirs in WITHIN.items()
        }
    kinds = ("weight", "bias")
    names = {f"{ours}.{kind}": [f"{m}.{kind}" for m in theirs] for ours, theirs in modules.items() for kind in kinds}
    return names | {ours: [embedder(0, ours)] for ours in EMBEDDERS}


def embedder(block: int, ours: str) -> str:
    """The block's copy of a tensor of the embedders."""
    return f"transformer_blocks.{block}.norm1.emb.{EMBEDDERS[ours]}"


def find_wrapped(folder: Path, config: dict[str, Any], prefix: str) -> Found:
    """Read a class of ours, around a model whose tensors' names have the prefix."""
    described = config.get("rootstock", {}), config.get("edits", ())
    rootstock, edits = parse_description(str(folder / "config.json"), *described)
    tensors = weights_of(folder)
    names = {name.removeprefix(prefix): name for name in tensors.shapes}
    return Found(tensors.renamed(names), heads=rootstock.heads, config=rootstock, edits=edits)


def find(folder: Path, config: dict[str, Any]) -> Found:
    """A folder that `save_pretrained` wrote."""
    if config["_class_name"] == WRAPPED:
        return find_wrapped(folder, config, "dit.")
    tensors = weights_of(folder)
    for setting, accepted in (("norm_type", "ada_norm_zero"), ("activation_fn", "gelu-approximate")):
        if config.get(setting, accepted) != accepted:
            raise UnfitCheckpoint(f"{folder}: {setting} is {config[setting]!r}, expected {accepted!r}, as DiT has it")
    require_ours(folder, config)
    heads = positive_integer(folder, config, "num_attention_heads", 16)
    sample_size = positive_integer(folder, config, "sample_size", 32)
    tensors, notes = unwrapped(tensors, (DIFFUSERS,))
    count = positive_integer(folder, config, "num_embeds_ada_norm", CLASSES_OF_PIPELINE)
    return Found(_translated(tensors, sample_size), heads=heads, num_classes=count, notes=tuple(notes))


def require_ours(folder: Path, config: dict[str, Any]) -> None:
    """Raise UnfitCheckpoint if the model, its pipeline or the scheduler in that are of another objective."""
    said = list(statements.statements(config, "config.json"))
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        said += statements.statements(statements.document(folder.parent / name), name)
    statements.kinds_of(str(folder), iter(said))


def positive_integer(folder: Path, config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise UnfitCheckpoint(f"{folder}: {name} is {shown(value)}, expected an integer of at least 1")
    return value


def weights_of(folder: Path) -> Tensors:
    """The tensors of a model's folder, in one file or several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return read_index(folder / f"{name}.index.json")
    raise UnfitCheckpoint(f"{folder}: has no {' or '.join(WEIGHTS)}, in one file or with an index")


def _translated(tensors: Tensors, sample_size: int) -> Tensors:
    """Return diffusers' tensors under DiT's names. Its one embedder stands in each block: the copies are left out."""
    depth = count_of(tensors, re.compile(r"transformer_blocks\.(\d+)\."))
    copies = set()
    for block in range(1, depth):
        for ours in (ours for ours in EMBEDDERS if embedder(0, ours) in tensors.shapes):
            _check_copy(tensors, embedder(block, ours), embedder(0, ours))
            copies.add(embedder(block, ours))
    patches = tensors.shapes.get("pos_embed.proj.weight", ())
    made: dict[str, Made] = {}
    if len(patches) == 4 and patches[2]:  # the embedding of positions is not in the file
        side, width = sample_size // patches[2], patches[0]
        made["pos_embed"] = Made((1, side**2, width), lambda: waves_of_positions(side, width))
    return translated(tensors, parts(depth), left_out={*copies, "pos_embed.pos_embed"}, made=made)


def count_of(tensors: Tensors, pattern: re.Pattern[str]) -> int:
    """Return how many blocks there are: one more than the last number that a tensor's name begins with.

    Raise UnfitCheckpoint for more than a model can have.
    """
    numbers = {number[1] for name in tensors.shapes if (number := pattern.match(name))}
    large = [number for number in numbers if len(number) > MAX_DIGITS or int(number) >= MAX_DEPTH]
    if large:
        raise UnfitCheckpoint(f"{tensors.source}: has a block {shown(large[0])}, expected at most {MAX_DEPTH} blocks")
    return 1 + max(map(int, numbers), default=-1)


def _check_copy(tensors: Tensors, copy: str, first: str) -> None:
    same = tensors.shapes.get(copy) == tensors.shapes[first] and torch.equal(tensors.get(copy), tensors.get(first))
    if not same:
        raise UnfitCheckpoint(f"{tensors.source}: {copy} is not {first}, and a DiT has one embedder for all blocks")


def write(transformer: ModelMixin, folder: Path, vae: AutoencoderKL | None = None) -> None:
    """Save what `wrapped` made as diffusers does; with an autoencoder, as a DiTPipeline with DiT's noise schedule."""
    if vae is None:
        transformer.save_pretrained(folder)
        return
    from diffusers import DDIMScheduler, DiTPipeline

    schedule = DDIMScheduler(STEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    DiTPipeline(transformer=transformer, vae=vae, scheduler=schedule).save_pretrained(folder)


def takes(model: Rootstock) -> bool:
    """Return whether the model is of the family whose class in diffusers this is."""
    return isinstance(model, DiT)


def wrapped(model: Rootstock, edits: Sequence[Edit]) -> DiTTransformer2DModel | GraftTransformer2DModel:
    """What DiTPipeline takes, around or made of the model's own tensors: diffusers' class for a rootstock, and for what
    carries its operators; ours for a graft, and for other classes than ImageNet's, of which the pipeline's null class
    would be none."""
    assert isinstance(model, DiT)  # as its family says, which alone has this layout
    of_pipeline = model.config.num_classes == CLASSES_OF_PIPELINE
    if of_pipeline and shapes_of(model.state_dict()) == shapes_of(weightless(model.config, ()).state_dict()):
        return rootstock_transformer(model)
    from graftwork.models.checkpoints.layouts.transformer import GraftTransformer2DModel

    return GraftTransformer2DModel.around(model, edits)


def rootstock_adapters(depth: int) -> Callable[[Adapters], Adapters]:
    """Return what names adapters by the layers of diffusers' model, of whose embedders each block has its own."""

    def named(adapters: Adapters) -> Adapters:
        theirs = renamed(adapters, layers_by_tensors(parts(depth)))
        copies = {
            embedder(block, ours).removesuffix(".weight"): theirs.factors[first]
            for ours in EMBEDDERS
            for block in range(1, depth)
            if (first := embedder(0, ours).removesuffix(".weight")) in theirs.factors
        }
        return replace(theirs, factors={**theirs.factors, **copies})

    return named


def rootstock_transformer(model: DiT) -> DiTTransformer2DModel:
    """diffusers' own model with a rootstock's tensors; see above for how far it computes the same."""
    from diffusers import DiTTransformer2DModel

    config, ours = model.config, model.state_dict()
    with Uninitialised():
        transformer = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size,
            patch_size=config.patch,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=1e-6,
        )
    names = parts(config.depth)
    state = split(ours, names)
    state |= {embedder(block, mine): ours[mine].clone() for block in range(1, config.depth) for mine in EMBEDDERS}
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()
