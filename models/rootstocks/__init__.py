"""Families of pretrained transformers: what all others know of a rootstock, and a file a family.

A family takes a class in specs/rootstock.py (what a job says of it, what it costs, how it is sampled) and a module
here: a config, which says by what its files are known, and the module with its slots. Whatever trains, distils,
observes, searches, samples, measures, reads and exports goes by the contract below, and names no family.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftwork.models.condition import Condition, Conditioner, Texts
from graftwork.models.objectives import Objective
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.models.rootstocks.parallel import Absorbed, ParallelBlock
from graftwork.specs.costs import Formulas
from graftwork.specs.edits import Site
from graftwork.specs.operators import Place
from graftwork.specs.rootstock import Model


@dataclass(frozen=True, kw_only=True)
class RootstockConfig(ABC):
    """Everything that fixes the tensors of a rootstock. Each family has these fields and others."""

    kind: ClassVar[str]
    formulas: ClassVar[Formulas]  # of its cost: those of the family's spec
    files: ClassVar[FamilyFiles]  # by what its checkpoints are known
    if TYPE_CHECKING:
        in_channels: int  # C, of a latent
        patch: int
        depth: int  # blocks
        width: int  # D
        heads: int
        num_classes: int

    @classmethod
    @abstractmethod
    def of(cls, model: Any, shape: Sequence[int], num_classes: int) -> Self:
        """Return the config of what a spec says, for latents (C,..) of this shape and so many classes."""

    @classmethod
    @abstractmethod
    def of_tensors(cls, shapes: Mapping[str, Sequence[int]], heads: int | None) -> Self:
        """Return the config of a file by its tensors' shapes, all that `files.telling` names among them.

        heads: attention heads, if they are known. Raise ValueError if it cannot be told.
        """

    @classmethod
    def heads_of(cls, name: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Return the attention heads of the published model of a name, if these tensors can have them; else None."""
        return None

    def published_arguments(self) -> dict[str, Any]:
        """Return what a training script's arguments say of such a model, for the `published` layout."""
        return {"model": None, **self.files.arguments}

    @abstractmethod
    def shape_misfit(self) -> str | None:
        """Return which of its sizes do not go together; None if there can be such a model."""

    @property
    @abstractmethod
    def learn_sigma(self) -> bool:
        """Whether the output has as many channels again, which the objective may use."""

    @property
    @abstractmethod
    def place(self) -> Place:
        """What an operator in a block sees."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent: (C,..)."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    @abstractmethod
    def conditioner(self) -> Conditioner:
        """What knows the null condition of the family."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What the family's models predict, and the loss."""


@dataclass(frozen=True)
class Stream:
    """What goes from block to block: the tokens, and what each block is given beside them."""

    tokens: Tensor  # (B,N,D)
    conditioning: tuple[Tensor, ...]  # such as the modulating (B,D) of a DiT


@dataclass(frozen=True)
class Slot:
    """Where an operator stands: an attribute of a module, whose output the block multiplies by a gate."""

    parent: nn.Module
    attribute: str
    gate: Callable[[Stream], Tensor] | None = None  # of the stream before the block: (B,D)

    @property
    def operator(self) -> nn.Module:
        operator: nn.Module = getattr(self.parent, self.attribute)
        return operator

    def fill(self, operator: nn.Module) -> None:
        setattr(self.parent, self.attribute, operator)


class Rootstock(nn.Module, ABC):
    """A transformer of blocks: a noised latent, its timestep and a condition in; what the objective predicts out."""

    config: RootstockConfig
    blocks: nn.ModuleList
    checkpointing: bool = False  # in training, keep each block's input alone and compute the rest again
    on_block: Callable[[int, Tensor], None] | None = None  # is told each block's number and what leaves it, (B,N,D)
    texts: Texts | None = None  # by which a model of texts knows them where it is told labels

    @property
    def conditioner(self) -> Conditioner:
        """What knows the null condition."""
        return self.config.conditioner if self.texts is None else self.texts.conditioner

    @abstractmethod
    def initialise(self, label_std: float) -> None:
        """Draw weights as published, from torch's global generator."""

    @abstractmethod
    def start(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Stream:
        """Return the stream before the first block. Raise ValueError for a condition of another kind."""

    @abstractmethod
    def finish(self, stream: Stream) -> Tensor:
        """Return the output (B,C_out,..) of the stream behind the last block."""

    @abstractmethod
    def slots_of(self, block: nn.Module) -> Mapping[str, Slot]:
        """Return the slots of one of the family's own blocks, by target."""

    def through(self, index: int, stream: Stream) -> Stream:
        """Return the stream behind the block of that number."""
        block, given = self.blocks[index], (stream.tokens, *stream.conditioning)
        if self.checkpointing:  # nothing in a block is random
            tokens = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens = block(*given)
        if self.on_block is not None:
            self.on_block(index, tokens)
        return Stream(tokens, stream.conditioning)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Tensor:
        """Return the output (B,C_out,..) for x (B,C,..) at t (B,)."""
        stream = self.start(x, t, condition)
        for index in range(len(self.blocks)):
            stream = self.through(index, stream)
        return self.finish(stream)

    def block_at(self, index: int) -> nn.Module:
        """Return the family's own block of that number, also where a parallel block has taken it in."""
        block = self.blocks[index]
        if isinstance(block, ParallelBlock):
            return block.first
        if isinstance(block, Absorbed):
            pair = self.blocks[index - 1]
            assert isinstance(pair, ParallelBlock)
            return pair.second
        return block

    def slot(self, site: Site) -> Slot:
        """Return the slot of a site within a block. Raise KeyError for a target that the family does not have."""
        return self.slots_of(self.block_at(site.block))[site.target]


R = TypeVar("R", bound=type[Rootstock])
CONFIGS: dict[str, type[RootstockConfig]] = {}
FAMILIES: dict[str, type[Rootstock]] = {}


def register(config: type[RootstockConfig]) -> Callable[[R], R]:
    """Decorate the module of a family, which is built from its config."""

    def keep(family: R) -> R:
        CONFIGS[config.kind], FAMILIES[config.kind] = config, family
        return family

    return keep


def config_of(model: Model, shape: Sequence[int], num_classes: int) -> RootstockConfig:
    """Return the config of the model that a spec describes, for latents (C,..) of this shape and so many classes."""
    return CONFIGS[model.kind].of(model, shape, num_classes)


def new_rootstock(config: RootstockConfig) -> Rootstock:
    """Return the rootstock of a config, with whatever weights its modules begin with."""
    family: Callable[[RootstockConfig], Rootstock] = FAMILIES[config.kind]
    return family(config)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
