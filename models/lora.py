"""LoRA adapters around linear layers, added and merged."""

from __future__ import annotations

from torch import nn


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
