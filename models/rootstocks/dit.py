"""The diffusion transformer (DiT, arXiv 2212.09748), with the tensor names of its published checkpoints.

Shapes: B batch, C latent channels, S latent side, P patch, N = (S / P)^2 tokens, D width, H heads, L depth.
A block is  x + gate * operator(norm(x) * (1 + scale) + shift), once with `attn` and once with `mlp`. A graft replaces
those two operators only; norms, modulation and gates stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from graftwork.models.condition import ClassConditioner, Condition
from graftwork.models.objectives import Objective, objective_of
from graftwork.models.objectives.gaussian import STEPS
from graftwork.models.operators import build_operator
from graftwork.models.rootstocks import Rootstock, Slot, Stream, register
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.models.rootstocks.layers import (
    OUTPUT,
    PATCHES,
    POSITIONS,
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
from graftwork.specs.rootstock import SIZES, DitModel

PIXELS = 8  # along a side of a latent's element, in the published autoencoder
LABELS = "y_embedder.embedding_table.weight"
FILES = FamilyFiles(
    name="DiT",
    prediction=DitModel.prediction,
    accepted=f"a DiT that predicts noise (epsilon), of {STEPS} steps with linear betas",
    telling={PATCHES: 4, POSITIONS: 3, LABELS: 2, f"{OUTPUT}.weight": 2},
    others={
        r"blocks\.\d+\.attn\.[qk]_norm\.": "which normalises queries and keys, as LightningDiT does",
        r"blocks\.\d+\.mlp\.w\d+\.": "whose feed-forward is a SwiGLU, as LightningDiT's is",
        r"mask_token|(en|de|in|out|side|mid)_?\w*blocks?\.|decoder_\w+": "of an encoder and a decoder, as MDT is",
        r"(\w+_level_\d|(down|up)\w*[._]\d|skip_\w+|\w+\.skip_linear)": (
            "with levels and skips, as U-DiT and U-ViT have"
        ),
        r"projectors?\.": "trained beside projectors, as REPA's SiT is",
        r"blocks\.\d+\.(cross_attn|scale_shift_table)|caption_\w+|y_embedder\.y_proj": "of captions, as PixArt is",
    },
    label_table=LABELS,
    output=OUTPUT,
    layouts=("graftwork", "diffusers", "published"),
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(SquareConfig):
    """Everything that fixes the tensors of a DiT."""

    kind: ClassVar[str] = "dit"
    formulas: ClassVar[Formulas] = DitModel.formulas
    files: ClassVar[FamilyFiles] = FILES

    @classmethod
    def of(cls, model: DitModel, shape: Sequence[int], num_classes: int) -> Self:
        """Return the config of what a spec says, for latents (C,S,S). Raise ValueError if they are not square."""
        return cls(**asked_shape(model, shape), num_classes=num_classes)

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Sequence[int]], heads: int | None) -> Self:
        """Return the config of a file by its tensors' shapes; see `shape_of` for errors."""
        return cls(**shape_of(shapes, heads, SIZES), num_classes=shapes[LABELS][0] - 1)

    @classmethod
    def heads_of(cls, name: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Return the attention heads of `DiT-XL/2` and the like, if these tensors can have them; else None."""
        letter = name.removeprefix(f"{cls.files.name}-").partition("/")[0]
        width = next(iter(shapes.get(PATCHES, ())), 0)
        return SIZES[letter][2] if letter in SIZES and width % SIZES[letter][2] == 0 else None

    def published_name(self) -> str | None:
        """Return `DiT-XL/2` and the like; None if the shape is no published one."""
        letter = self.letter(SIZES)
        return f"{self.files.name}-{letter}/{self.patch}" if letter else None

    def published_arguments(self) -> dict[str, Any]:
        """Return what the training script's arguments say of such a model."""
        return {
            "model": self.published_name(),
            **self.files.arguments,
            "image_size": PIXELS * self.input_size,
            "num_classes": self.num_classes,
        }

    @property
    def conditioner(self) -> ClassConditioner:
        return ClassConditioner(self.num_classes)

    @property
    def objective(self) -> Objective:
        return objective_of("epsilon")


class LabelEmbedding(nn.Module):
    """(B,) labels -> (B,D); label `num_classes` is the null class of unconditional samples."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """One transformer block under adaLN-Zero conditioning."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.norm1 = layer_norm(place.width)
        self.attn: nn.Module = build_operator(ORIGINALS["mha"], place)
        self.norm2 = layer_norm(place.width)
        self.mlp: nn.Module = build_operator(ORIGINALS["mlp"], place)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(place.width, 6 * place.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """(B,N,D) -> (B,N,P*P*C_out)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = layer_norm(config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


@register(DiTConfig)
class DiT(Rootstock):
    """The whole transformer: a noised latent, its timestep and its label in; noise (and variance) out.

    A tensor of labels (B,) will do for the condition: `model(x, t, labels)`.
    """

    config: DiTConfig
    pos_embed: Tensor  # (1,N,D)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimestepEmbedding(config.width)
        self.y_embedder = LabelEmbedding(config.num_classes, config.width)
        self.register_buffer("pos_embed", position_embedding(config))
        self.blocks = nn.ModuleList(Block(config.place) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def initialise(self, label_std: float = 0.02) -> None:
        """Published initialisation: xavier-uniform linears, N(0, .02) embeddings, adaLN and the final layer zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in self.t_embedder.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=label_std)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def slots_of(self, block: nn.Module) -> dict[str, Slot]:
        """Return the slots of attention and MLP; their gates are the third and sixth of a block's modulations."""
        assert isinstance(block, Block)
        return {
            "mha": Slot(block, "attn", lambda stream: modulations(block, stream.conditioning[0])[2]),
            "mlp": Slot(block, "mlp", lambda stream: modulations(block, stream.conditioning[0])[5]),
        }

    def finish(self, stream: Stream) -> Tensor:
        return self.unpatchify(self.final_layer(stream.tokens, *stream.conditioning))

    def start(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Stream:
        """Return tokens (B,N,D) and what modulates the blocks (B,D). Raises ValueError if there are no labels."""
        labels = Condition.of(condition).require("labels")
        tokens = self.x_embedder(x)
        # As the weights are: fp32 where autocast makes the products alone bf16, which keeps the stream of all blocks in
        # fp32, as published; bf16 where an engine cast the parameters, which may have left this buffer in fp32.
        embedding = self.pos_embed.to(self.x_embedder.proj.weight.dtype)
        return Stream(tokens + embedding, (self.t_embedder(t) + self.y_embedder(labels),))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B,N,P*P*C_out), channels last within a patch -> (B,C_out,S,S)."""
        config = self.config
        return unpatchified(x, config.side, config.patch, config.out_channels)


def position_embedding(config: DiTConfig) -> Tensor:
    """Return the fixed embedding (1,N,D) of a DiT's positions."""
    return waves_of_positions(config.side, config.width)


def modulations(block: Block, c: Tensor) -> tuple[Tensor, ...]:
    """Return the block's six modulations (B,D) under c (B,D), in the published order."""
    return tuple(block.adaLN_modulation(c).chunk(6, dim=1))
