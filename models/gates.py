"""Gates that learn which operators of a rootstock to keep (TinyFusion, arXiv 2409.17481, section 3; REFERENCE 6).

In each candidate site the original and the scion run side by side. A group of consecutive blocks keeps n originals, so
it has one logit for each admissible mask; every example of a batch draws one mask of every group, with a hard
Gumbel-softmax whose gradient is that of the soft one. The rootstock is frozen but for LoRA; scions train whole.

Shapes: B batch, N tokens, D width, G groups, M masks, over all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from models.dit import DiT
from models.streams import initialising
from models.surgery import replace, scion_at
from specs.graft import Site
from specs.layers import Group


def admissible_masks(group: Group) -> tuple[tuple[int, ...], ...]:
    """The sets of blocks that may keep their original: `keep` of the group's, the pinned among them."""
    free = [block for block in group.blocks if block not in group.pinned]
    chosen = combinations(free, group.keep - len(group.pinned))
    return tuple(sorted(tuple(sorted((*group.pinned, *blocks))) for blocks in chosen))


def gumbel(batch: int, masks: int, source: torch.Generator) -> Tensor:
    """Standard Gumbel noise (B,M)."""
    return -torch.empty(batch, masks).exponential_(generator=source).log()


class Gates(nn.Module):
    """One logit for each admissible mask of each group."""

    def __init__(self, groups: Sequence[Group], logit_start: float) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.masks = tuple(admissible_masks(group) for group in groups)
        self.sizes = [len(masks) for masks in self.masks]
        self.logits = nn.Parameter(torch.full((sum(self.sizes),), logit_start))  # (M,), group after group

    def sample(self, noise: Tensor, temperature: float, scale: float) -> dict[int, Tensor]:
        """For each block (B,): 1 where the example keeps the original, 0 where it takes the scion; straight-through.

        noise: Gumbel (B,M), which makes each mask as likely as `probabilities(scale)` says.
        """
        kept: dict[int, Tensor] = {}
        for group, masks, scores in zip(
            self.groups, self.masks, (self.logits * scale + noise).split(self.sizes, dim=1), strict=True
        ):
            soft = (scores / temperature).softmax(dim=1)
            hard = nn.functional.one_hot(scores.argmax(dim=1), len(masks)).to(soft)
            drawn = hard + (soft - soft.detach())  # exactly `hard`, with the gradient of `soft`
            for block in group.blocks:
                kept[block] = drawn @ soft.new_tensor([block in mask for mask in masks])
        return kept

    def probabilities(self, scale: float, logits: Tensor | None = None) -> list[Tensor]:
        """Of each group's masks; under these logits (M,), or else the gates' own."""
        scaled = scale * (self.logits if logits is None else logits).detach()
        return [scores.softmax(dim=0) for scores in scaled.split(self.sizes)]

    def choice(self) -> tuple[tuple[int, ...], ...]:
        """Each group's most probable mask; of equal ones the first."""
        return tuple(
            masks[int(logits.argmax())] for masks, logits in zip(self.masks, self.logits.split(self.sizes), strict=True)
        )


class GatedOperator(nn.Module):
    """The original and the scion of a site, side by side; `keep` (B,) says which of them each example gets."""

    keep: Tensor

    def __init__(self, original: nn.Module, scion: nn.Module) -> None:
        super().__init__()
        self.original, self.scion = original, scion

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)"""
        keep = self.keep[:, None, None]
        return keep * self.original(x) + (1 - keep) * self.scion(x)


class GatedDiT(nn.Module):
    """A rootstock under search: frozen but for LoRA on its linear layers, with a scion beside each candidate."""

    def __init__(
        self,
        model: DiT,
        scions: Mapping[Site, nn.Module],
        groups: Sequence[Group],
        *,
        logit_start: float = 0.02,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        seed: int = 0,
    ) -> None:
        """Takes `model` over. seed: of LoRA's first factor; the second starts as 0, and so does the update."""
        super().__init__()
        with initialising(seed, "search", "lora"):
            add_lora(model, lora_rank, lora_alpha)
        for site, scion in scions.items():
            replace(model, site, GatedOperator(scion_at(model, site), scion))
        self.model, self.sites = model, tuple(scions)
        self.gates = Gates(groups, logit_start)

    def draw(self, noise: Tensor, temperature: float, scale: float) -> None:
        """Draw every example's masks for the next passes; see `Gates.sample`."""
        kept = self.gates.sample(noise, temperature, scale)
        for site in self.sites:
            self._gated(site).keep = kept[site.block]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y)

    def chosen(self) -> tuple[Site, ...]:
        """The sites whose scion the gates chose."""
        kept = {block for mask in self.gates.choice() for block in mask}
        return tuple(site for site in self.sites if site.block not in kept)

    def merge(self) -> DiT:
        """The model as chosen, plain again: LoRA added to the weights, the scions of the chosen sites in place.

        It is made of this one's parts, which is used up.
        """
        chosen = self.chosen()
        for site in self.sites:
            gated = self._gated(site)
            replace(self.model, site, gated.scion if site in chosen else gated.original)
        merge_lora(self.model)
        return self.model.requires_grad_()

    def _gated(self, site: Site) -> GatedOperator:
        operator = scion_at(self.model, site)
        assert isinstance(operator, GatedOperator)
        return operator


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Add to each linear layer a trainable update of low rank (arXiv 2106.09685), 0 at first, and freeze the rest."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: it brings transformers along

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears), model)


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights, in place, and leave plain linear layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
