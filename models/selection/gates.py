"""Gates that learn which operators of a rootstock to keep (TinyFusion, arXiv 2409.17481, section 3).

In each candidate site the original and its scions run side by side. A gate has one logit for each of its choices, and
every example of a batch draws one choice of every gate, with a hard Gumbel-softmax whose gradient is that of the soft
one. There is a gate for each group of consecutive blocks, which keeps n originals: its choices are the admissible
masks. Under a budget there is one for each site instead: its choices are the original and each of the scions. The
rootstock is frozen but for LoRA; scions train whole.

Shapes: B batch, N tokens, D width, M choices, over all gates, O what a site may hold: the original, and its scions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.lora import add_lora, merge_lora
from graftwork.models.numerics.streams import initialising
from graftwork.models.rootstocks import Rootstock
from graftwork.models.selection.budget import Budget
from graftwork.models.surgery import replace, scion_at
from graftwork.specs.edits import Site
from graftwork.specs.layers.learned import Group


@dataclass(frozen=True)
class Gate:
    """A choice of what the sites of some blocks hold."""

    blocks: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]  # of each, what each block's site holds: 0 the original, 1 .. a scion

    @classmethod
    def of_group(cls, group: Group) -> Gate:
        masks = admissible_masks(group)
        return cls(group.blocks, tuple(tuple(int(block not in mask) for block in group.blocks) for mask in masks))

    @classmethod
    def of_site(cls, block: int, num_scions: int) -> Gate:
        return cls((block,), tuple((holding,) for holding in range(1 + num_scions)))

    def options_of(self, position: int) -> Tensor:
        """Return (M,O), one-hot: row m is the option that choice m puts into the block at `position`."""
        held = torch.tensor([choice[position] for choice in self.choices])
        return nn.functional.one_hot(held, 1 + max(max(choice) for choice in self.choices))


def admissible_masks(group: Group) -> tuple[tuple[int, ...], ...]:
    """The sets of blocks that may keep their original: `keep` of the group's, the pinned among them."""
    free = [block for block in group.blocks if block not in group.pinned]
    chosen = combinations(free, group.keep - len(group.pinned))
    return tuple(sorted(tuple(sorted((*group.pinned, *blocks))) for blocks in chosen))


def gumbel(batch: int, choices: int, source: torch.Generator) -> Tensor:
    """Standard Gumbel noise (B,M)."""
    return -torch.empty(batch, choices).exponential_(generator=source).log()


class Gates(nn.Module):
    """One logit for each choice of each gate."""

    def __init__(self, gates: Sequence[Gate], logit_start: float) -> None:
        super().__init__()
        self.gates = tuple(gates)
        self.sizes = [len(gate.choices) for gate in gates]
        self.logits = nn.Parameter(torch.full((sum(self.sizes),), logit_start))  # (M,), gate after gate
        for number, gate in enumerate(gates):  # buffers, so that they are where the logits are
            for position in range(len(gate.blocks)):
                table = gate.options_of(position).to(self.logits.dtype)
                self.register_buffer(_holdings(number, position), table, persistent=False)

    def sample(self, noise: Tensor, temperature: float, scale: float) -> dict[int, Tensor]:
        """For each block (B,O): 1 at what the site holds for the example, 0 elsewhere; straight-through.

        noise: Gumbel (B,M), which makes each choice as likely as `probabilities(scale)` says.
        """
        holds: dict[int, Tensor] = {}
        parts = (self.logits * scale + noise).split(self.sizes, dim=1)
        for number, (gate, scores) in enumerate(zip(self.gates, parts, strict=True)):
            soft = (scores / temperature).softmax(dim=1)
            hard = nn.functional.one_hot(scores.argmax(dim=1), len(gate.choices)).to(soft)
            drawn = hard + (soft - soft.detach())  # exactly `hard`, with the gradient of `soft`
            for position, block in enumerate(gate.blocks):
                holds[block] = drawn @ self.get_buffer(_holdings(number, position)).to(drawn)
        return holds

    def probabilities(self, scale: float, logits: Tensor | None = None) -> list[Tensor]:
        """Of each gate's choices; under these logits (M,), or else the gates' own."""
        scaled = scale * (self.logits if logits is None else logits)
        return [scores.softmax(dim=0) for scores in scaled.split(self.sizes)]

    def choice(self, budget: Budget | None = None) -> dict[int, int]:
        """What each block's site holds by each gate's most probable choice, of equal ones the first.

        Under a budget, with a gate for each site: of what meets it, the most probable as a whole. (At any scale
        log-probabilities rank as logits do.)
        """
        scores = [logits.tolist() for logits in self.logits.detach().split(self.sizes)]
        if budget is not None:
            return budget.best({gate.blocks[0]: values for gate, values in zip(self.gates, scores, strict=True)})
        return {
            block: holding
            for gate, values in zip(self.gates, scores, strict=True)
            for block, holding in zip(gate.blocks, gate.choices[values.index(max(values))], strict=True)
        }


def _holdings(number: int, position: int) -> str:
    """Return the name of a gate's table (M,O) for the block at that position."""
    return f"holdings_{number}_{position}"


class GatedOperator(nn.Module):
    """What a site may hold, side by side; `holds` (B,O) says which of it each example gets."""

    holds: Tensor

    def __init__(self, original: nn.Module, scions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.original, self.scions = original, nn.ModuleList(scions)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)"""
        gate, *gates = self.holds[:, :, None, None].unbind(dim=1)
        out = gate * self.original(x)
        for gate, scion in zip(gates, self.scions, strict=True):
            out = out + gate * scion(x)
        return out

    def holding(self, holding: int) -> nn.Module:
        return self.scions[holding - 1] if holding else self.original


class GatedRootstock(nn.Module):
    """A rootstock under search: frozen but for LoRA on its linear layers, with scions beside each candidate."""

    def __init__(
        self,
        model: Rootstock,
        scions: Mapping[Site, Sequence[nn.Module]],
        gates: Sequence[Gate],
        budget: Budget | None = None,
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
        for site, beside in scions.items():
            replace(model, site, GatedOperator(scion_at(model, site), beside))
        self.model, self.sites, self.budget = model, tuple(scions), budget
        self.gates = Gates(gates, logit_start)

    def draw(self, noise: Tensor, temperature: float, scale: float) -> None:
        """Draw what the sites hold for every example in the next passes; see `Gates.sample`."""
        holds = self.gates.sample(noise, temperature, scale)
        for site in self.sites:
            self._gated(site).holds = holds[site.block]

    def forward(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Tensor:
        return self.model(x, t, condition)

    def choice(self) -> dict[Site, int]:
        """What each site is to hold: 0 its original, 1 .. a scion."""
        holds = self.gates.choice(self.budget)
        return {site: holds[site.block] for site in self.sites}

    def merge(self) -> Rootstock:
        """The model as chosen, plain again: LoRA added to the weights, in each site what was chosen for it.

        It is made of this one's parts, which is used up.
        """
        for site, holding in self.choice().items():
            replace(self.model, site, self._gated(site).holding(holding))
        merge_lora(self.model)
        return self.model.requires_grad_()

    def _gated(self, site: Site) -> GatedOperator:
        operator = scion_at(self.model, site)
        assert isinstance(operator, GatedOperator)
        return operator
