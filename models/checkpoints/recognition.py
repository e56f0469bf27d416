"""Which model a file holds, by the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from models.checkpoints.files import Shape, Tensors
from models.checkpoints.fit import UnfitCheckpoint, named, shapes_of, weightless
from models.dit import DiTConfig
from models.operators import REGISTRY, recognise
from models.surgery import ATTRIBUTE
from specs.graft import Edit, Site
from specs.model import SIZES
from specs.operators import Target

# What a rootstock's shape is read from, with the number of dimensions it has.
TELLING = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
TARGETS: tuple[Target, ...] = ("mha", "mlp")


@dataclass(frozen=True)
class Found:
    """A checkpoint before a model is made of it: its tensors, under DiT's names, and what else it says of itself."""

    tensors: Tensors
    heads: int | None = None
    config: DiTConfig | None = None
    edits: tuple[Edit, ...] | None = None


def edits_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Edits as the layouts keep them: what stands where; not where it came from, which is a matter of one machine."""
    return [edit.model_dump(mode="json", exclude={"scions"}) for edit in edits]


def said(source: str, rootstock: dict[str, Any], listed: Iterable[Any]) -> tuple[DiTConfig, tuple[Edit, ...]]:
    """The rootstock and the edits that a file names."""
    try:
        return DiTConfig(**rootstock), edits_from(listed)
    except (TypeError, ValueError) as error:
        problem = "; ".join(str(error).splitlines()[:3])
        raise UnfitCheckpoint(f"{source}: names no rootstock or edits that are known here: {problem}") from None


def edits_from(listed: Iterable[Any]) -> tuple[Edit, ...]:
    return tuple(Edit.model_validate(edit) for edit in listed)


def recognised(found: Found, config: DiTConfig | None, heads: int | None) -> tuple[DiTConfig, tuple[Edit, ...]]:
    """The rootstock and the edits: as the file says, else as its shapes do.

    config: the rootstock expected, if any; heads: of a file that does not tell.
    """
    tensors, wanted = found.tensors, config.heads if config else heads
    if found.heads and wanted and found.heads != wanted:
        raise UnfitCheckpoint(f"{tensors.source}: has {found.heads} attention heads, expected {wanted}")
    rootstock = config or found.config or rootstock_of(tensors, found.heads or wanted)
    return rootstock, edits_of(tensors, rootstock) if found.edits is None else found.edits


def rootstock_of(tensors: Tensors, heads: int | None) -> DiTConfig:
    """The rootstock's shape; its heads cannot be seen, and are those of the published size unless they are given."""
    shapes, source = tensors.shapes, tensors.source
    absent = [name for name, rank in TELLING.items() if len(shapes.get(name, ())) != rank]
    if absent:
        raise UnfitCheckpoint(f"{source}: is no DiT, has no {', '.join(absent)}; holds {named(sorted(shapes))}")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    num_tokens, rows = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
    blocks = [int(number[1]) for name in shapes if (number := re.match(r"blocks\.(\d+)\.", name))]
    depth, side = 1 + max(blocks, default=-1), math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise UnfitCheckpoint(f"{source}: pos_embed: {shapes['pos_embed']}, expected a square number of tokens")
    heads = heads or next((size[2] for size in SIZES.values() if size[:2] == (depth, width)), None)
    if heads is None:
        raise UnfitCheckpoint(
            f"{source}: {depth} blocks of width {width} are no published size, and a file does not tell its attention "
            "heads: name their number"
        )
    if width % heads:
        raise UnfitCheckpoint(f"{source}: {heads} attention heads do not divide its width, {width}")
    return DiTConfig(
        input_size=side * patch,
        in_channels=channels,
        patch=patch,
        depth=depth,
        width=width,
        heads=heads,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        learn_sigma=rows == 2 * channels * patch**2,
    )


def edits_of(tensors: Tensors, config: DiTConfig) -> tuple[Edit, ...]:
    """The scions, site by site. What has the rootstock's tensors is no edit; `swa` gets its default window."""
    block = weightless(replace(config, depth=1), ()).blocks[0]
    edits = []
    for index in range(config.depth):
        for target in TARGETS:
            own = shapes_of(getattr(block, ATTRIBUTE[target]).state_dict())
            prefix = f"blocks.{index}.{ATTRIBUTE[target]}."
            shapes = {name.removeprefix(prefix): s for name, s in tensors.shapes.items() if name.startswith(prefix)}
            # Rootstock's names with other shapes may still be a scion, as an mlp of another ratio is.
            operator = None if shapes == own else recognise(shapes, target, config.place)
            if operator is not None:
                edits.append(Edit(site=Site(block=index, target=target), operator=operator))
            elif shapes.keys() - own.keys():
                raise UnfitCheckpoint(_unknown(tensors.source, prefix, shapes, target))
    return tuple(sorted(edits, key=Edit.sort_key))


def _unknown(source: str, prefix: str, shapes: dict[str, Shape], target: Target) -> str:
    known = ", ".join(kind.model_fields["kind"].default for kind in REGISTRY if target in kind.targets)
    tensors = named([f"{prefix}{name}: {shape}" for name, shape in sorted(shapes.items())])
    return f"{source}: no known operator: {tensors}; expected the tensors of one of {known}"
