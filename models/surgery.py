"""Surgery: look at the operator in a site, put another in its place, watch what goes in and out of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.dit import Block, DiT
from models.operators import build_operator
from models.streams import initialising
from specs.graft import Edit, Site
from specs.operators import Operator

ATTRIBUTE = {"mha": "attn", "mlp": "mlp"}  # a target's name within a block
GATE = {"mha": 2, "mlp": 5}  # a target's gate among the six modulations


def prefix(site: Site) -> str:
    """Where the site's tensors stand in a state dict."""
    return f"blocks.{site.block}.{ATTRIBUTE[site.target]}."


def operator_at(model: DiT, site: Site) -> nn.Module:
    return getattr(model.blocks[site.block], ATTRIBUTE[site.target])


def replace(model: DiT, site: Site, operator: nn.Module) -> None:
    setattr(model.blocks[site.block], ATTRIBUTE[site.target], operator)


def new_scion(model: DiT, site: Site, operator: Operator, seed: int) -> nn.Module:
    """A freshly initialised scion for the site; the same seed gives the same weights wherever it is made."""
    config = model.config
    with initialising(seed, "scion", str(site)):
        return build_operator(operator, config.width, config.heads, config.num_tokens)


def graft(model: DiT, edits: Iterable[Edit], seed: int) -> DiT:
    """Put a fresh scion into each edit's site, in place."""
    for edit in edits:
        replace(model, edit.site, new_scion(model, edit.site, edit.operator, seed))
    return model


@dataclass(frozen=True)
class Observation:
    """What an operator saw and made of it."""

    input: Tensor  # (B,N,D), after norm and modulation
    output: Tensor  # (B,N,D), before the gate
    gate: Tensor  # (B,D)


@torch.no_grad()
def observe(model: DiT, sites: Iterable[Site], x: Tensor, t: Tensor, y: Tensor) -> dict[Site, Observation]:
    """Run the rootstock on (x, t, y), no further than the last site's block, and record each site's operator."""
    sites = tuple(sites)
    seen: dict[Site, tuple[Tensor, Tensor]] = {}
    hooks = [
        operator_at(model, site).register_forward_hook(
            lambda _, args, output, site=site: seen.__setitem__(site, (args[0], output))
        )
        for site in sites
    ]
    try:
        tokens, c = model.embed(x, t, y)
        for block in model.blocks[: 1 + max(site.block for site in sites)]:
            tokens = block(tokens, c)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        site: Observation(*seen[site], modulations(model.blocks[site.block], c)[GATE[site.target]]) for site in sites
    }


def modulations(block: nn.Module, c: Tensor) -> tuple[Tensor, ...]:
    """The block's six modulations (B,D) under condition c (B,D), in DiT's order."""
    assert isinstance(block, Block)
    return tuple(block.adaLN_modulation(c).chunk(6, dim=1))
