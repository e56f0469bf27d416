"""PixArt-Sigma (arXiv 2403.04692), built from the published formulas: text in, noise and its variance out.

It differs from a DiT in three things. All blocks share one modulation of the timestep, to which each adds a table of
its own. Between self-attention and MLP stands a cross-attention to the text, without norm, modulation or gate, which is
no site. And the position embedding is stretched to the size of the model's images.

Shapes: B batch, C latent channels, S latent pixels a side, N tokens, D width, H heads, P patch side, L tokens of a
text, E channels of the text encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.condition import Condition, TextConditioner
from graftwork.models.objectives import Objective, objective_of
from graftwork.models.objectives.gaussian import STEPS
from graftwork.models.operators import build_operator
from graftwork.models.operators.attention import heads_first
from graftwork.models.rootstocks import Rootstock, Slot, Stream, register
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.models.rootstocks.layers import (
    OUTPUT,
    PATCHES,
    PatchEmbedding,
    TimestepEmbedding,
    layer_norm,
    modulate,
    unpatchified,
    waves_of_positions,
)
from graftwork.models.rootstocks.square import SquareConfig, asked_shape, shape_of
from graftwork.specs.costs import ORIGINALS, Formulas
from graftwork.specs.operators import Place
from graftwork.specs.rootstock import PIXART_SIZES, PixartModel

CAPTIONS = "y_embedder.y_proj.fc1.weight"  # (D,E)
MASKED = -10_000.0  # added to the scores of what fills a text up, as diffusers adds it
BASE_SIDE = 64  # S of the size at which positions are not stretched: images of 512 pixels
FILES = FamilyFiles(
    name="PixArt",
    prediction=PixartModel.prediction,
    accepted=f"a PixArt-Sigma that predicts noise (epsilon), of {STEPS} steps with linear betas",
    telling={PATCHES: 4, CAPTIONS: 2, "t_block.1.weight": 2, f"{OUTPUT}.weight": 2},
    others={
        r"blocks\.\d+\.attn\.[qk]_norm\.": "which normalises queries and keys",
        r"blocks\.\d+\.attn\.sr\.": "which compresses keys and values; no such weights were released",
        r"(csize|ar)_embedder\.": "of PixArt-alpha, which is told sizes and aspect ratios",
    },
    output=OUTPUT,
    called=r"pixart(?![-_]?alpha)(ms|sigma\w*|transformer2dmodel)?",
    use="model(x, t, Condition(text=states, mask=mask))",
    task="text-to-image",
    layouts=("graftwork", "diffusers"),
    # The null caption, kept in training files: it is what the text encoder makes of the empty string.
    unused=("y_embedder.y_embedding",),
)


@dataclass(frozen=True, kw_only=True)
class PixArtConfig(SquareConfig):
    """Everything that fixes the tensors of a PixArt-Sigma."""

    kind: ClassVar[str] = "pixart"
    formulas: ClassVar[Formulas] = PixartModel.formulas
    files: ClassVar[FamilyFiles] = FILES
    num_classes: int = 0
    caption_channels: int  # E
    interpolation: float | None = None  # of positions; by the size of its images if None

    @classmethod
    def of(cls, model: PixartModel, shape: Sequence[int], num_classes: int) -> Self:
        """Return the config of what a spec says, for latents (C,S,S). Raise ValueError if they are not square."""
        return cls(**asked_shape(model, shape), caption_channels=model.caption_channels)

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Sequence[int]], heads: int | None) -> Self:
        """Return the config of a file by its tensors' shapes; see `shape_of` for errors."""
        return cls(**shape_of(shapes, heads, PIXART_SIZES), caption_channels=shapes[CAPTIONS][1])

    def published_arguments(self) -> dict[str, Any]:
        """Return what a training script's arguments say of such a model."""
        letter = self.letter(PIXART_SIZES)
        return {"model": f"PixArtMS_{letter}_{self.patch}" if letter else None, **self.files.arguments}

    @property
    def stretch(self) -> float:
        """By how much positions lie closer than 1 apart: 0.5, 1, 2 and 4 at 256, 512, 1024 and 2048 pixels."""
        return self.input_size / BASE_SIDE if self.interpolation is None else self.interpolation

    @property
    def conditioner(self) -> TextConditioner:
        return TextConditioner(self.caption_channels)

    @property
    def objective(self) -> Objective:
        return objective_of("epsilon")


class CaptionEmbedding(nn.Module):
    """States of the text encoder (B,L,E) -> (B,L,D)."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.y_proj = nn.ModuleDict(
            {"fc1": nn.Linear(config.caption_channels, config.width), "fc2": nn.Linear(config.width, config.width)}
        )

    def forward(self, text: Tensor) -> Tensor:
        hidden = F.gelu(self.y_proj["fc1"](text), approximate="tanh")
        return self.y_proj["fc2"](hidden)


class CrossAttention(nn.Module):
    """Each token of the image attends to the tokens of its text; the original's names."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.heads = place.heads
        self.q_linear = nn.Linear(place.width, place.width)
        self.kv_linear = nn.Linear(place.width, 2 * place.width)
        self.proj = nn.Linear(place.width, place.width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        """Return (B,N,D) for x (B,N,D), text (B,L,D) and what is added to the scores (B,1,1,L)."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=bias.to(q.dtype))
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block under adaLN-single conditioning."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.norm1 = layer_norm(place.width)
        self.attn: nn.Module = build_operator(ORIGINALS["mha"], place)
        self.cross_attn = CrossAttention(place)
        self.norm2 = layer_norm(place.width)
        self.mlp: nn.Module = build_operator(ORIGINALS["mlp"], place)
        self.scale_shift_table = nn.Parameter(torch.randn(6, place.width) / math.sqrt(place.width))

    def forward(self, x: Tensor, shared: Tensor, _: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations(self, shared)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(x, text, bias)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def modulations(block: Block, shared: Tensor) -> tuple[Tensor, ...]:
    """Return the block's six modulations (B,D) beside the shared ones (B,6D), in the published order."""
    return (block.scale_shift_table + shared.unflatten(1, (6, -1))).unbind(1)


class FinalLayer(nn.Module):
    """(B,N,D) -> (B,N,P*P*C_out)."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.norm_final = layer_norm(config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.width) / math.sqrt(config.width))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + timestep[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


@register(PixArtConfig)
class PixArt(Rootstock):
    """The whole transformer: a noised latent, its timestep and its text in; noise and variance out."""

    config: PixArtConfig
    pos_embed: Tensor  # (1,N,D)

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimestepEmbedding(config.width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.y_embedder = CaptionEmbedding(config)
        positions = waves_of_positions(config.side, config.width, config.stretch)
        self.register_buffer("pos_embed", positions)
        self.blocks = nn.ModuleList(Block(config.place) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def initialise(self, label_std: float = 0.02) -> None:
        """Published initialisation: xavier-uniform linears, N(0, .02) in the embeddings, and zeros in the output of
        cross-attention and of the model. label_std is not used: there are no labels."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embeddings = (*self.t_embedder.mlp, *self.t_block, *self.y_embedder.y_proj.values())
        for linear in embeddings:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
            if isinstance(module, Block | FinalLayer):
                nn.init.normal_(module.scale_shift_table, std=1 / math.sqrt(self.config.width))
        nn.init.zeros_(self.final_layer.linear.weight)

    def slots_of(self, block: nn.Module) -> dict[str, Slot]:
        """Return the slots of self-attention and MLP; their gates are the third and sixth of a block's modulations."""
        assert isinstance(block, Block)
        return {
            "mha": Slot(block, "attn", lambda stream: modulations(block, stream.conditioning[0])[2]),
            "mlp": Slot(block, "mlp", lambda stream: modulations(block, stream.conditioning[0])[5]),
        }

    def start(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Stream:
        """Return tokens (B,N,D), and what blocks get beside them.

        That is the shared modulation (B,6D), the timestep's embedding (B,D) for the final layer, the text (B,L,D), and
        what is added to the scores of its tokens (B,1,1,L). Raise ValueError if there is no text, nor a label of one
        that the model knows, or for latents of another shape than the model's.
        """
        condition = Condition.of(condition)
        if condition.text is None and self.texts is not None:
            condition = self.texts(condition)
        states = condition.require("text")
        if x.shape[1:] != self.config.latent_shape:
            accepted = f"{self.config.latent_shape}, to which its positions belong"
            raise ValueError(f"latents: got {tuple(x.shape[1:])} a sample; accepted: {accepted}")
        weight = self.x_embedder.proj.weight
        tokens = self.x_embedder(x) + self.pos_embed.to(weight.dtype)
        timestep = self.t_embedder(t)
        text = self.y_embedder(states.to(weight.dtype))
        mask = states.new_ones(states.shape[:2]) if condition.mask is None else condition.mask
        bias = (1 - mask.to(weight.dtype))[:, None, None, :] * MASKED
        return Stream(tokens, (self.t_block(timestep), timestep, text, bias))

    def finish(self, stream: Stream) -> Tensor:
        config = self.config
        tokens = self.final_layer(stream.tokens, stream.conditioning[1])
        return unpatchified(tokens, config.side, config.patch, config.out_channels)
