"""LoRA adapters around linear layers: added, merged, and taken out again."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

ACCEPTED = "accepted: such as attn.qkv, attn.proj, mlp.fc1, mlp.fc2"


@dataclass(frozen=True)
class Adapters:
    """Updates of linear layers: of each, by its name, `down` (R,I) and `up` (O,R).

    A layer's weight (O,I) is updated by alpha / rank * up @ down.
    """

    rank: int
    alpha: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    apart: Collection[nn.Module] = (),
) -> None:
    """Add to linear layers a trainable update of low rank (arXiv 2106.09685), 0 at first, and freeze the rest.

    targets: endings of the names of those layers; all if None. apart: modules that get none and are not frozen.
    Raise ValueError with a line if no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: it brings transformers along

    left_out = {id(part) for module in apart for part in module.modules()}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in left_out and _is_target(name, targets)
    ]
    if not linears:
        raise ValueError(f"lora.targets: got {list(targets or ())}, endings of no linear layer's name; {ACCEPTED}")
    whole = "|".join(map(re.escape, linears))  # a list would be taken for endings
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=f"({whole})"), model)
    for module in apart:
        module.requires_grad_()


def _is_target(name: str, targets: Sequence[str] | None) -> bool:
    return targets is None or any(name == end or name.endswith(f".{end}") for end in targets)


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights, in place, and leave plain linear layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config


def adapters_of(model: nn.Module) -> Adapters:
    """Return the adapters that `add_lora` added to a model, and training changed."""
    from peft.tuners.lora import LoraLayer

    (config,) = cast(Any, model).peft_config.values()
    factors = {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return Adapters(config.r, config.lora_alpha, factors)


def take_out_lora(model: nn.Module, adapters: Adapters) -> None:
    """Subtract from the weights, in place, the updates that `merge_lora` added: to the last bits, as sums round."""
    with torch.no_grad():
        for name, (down, up) in adapters.factors.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.sub_((up @ down * (adapters.alpha / adapters.rank)).to(weight))
