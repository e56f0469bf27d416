"""LoRA adapters as files: as a finetuned graft keeps those that its weights hold already, and as peft loads them.

lora.safetensors            ours, beside model.safetensors: `down/` and `up/` of each layer, by its name in the model
adapter_config.json         peft's, beside
adapter_model.safetensors   its tensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftwork.models.lora import Adapters
from graftwork.specs.edits import Site

FILE, ABOUT = "lora.safetensors", "lora"
DOWN, UP = "down/", "up/"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class KeptAdapters:
    """Adapters that are in the weights of a model, and the sites whose scions they were trained with."""

    adapters: Adapters
    scions: tuple[str, ...]


def keep_adapters(adapters: Adapters, scions: Iterable[Site], folder: Path) -> None:
    """Write the adapters beside the model that they will be merged into.

    scions: the sites whose operators are others than the rootstock's; what has parameters was trained whole.
    """
    tensors = {f"{DOWN}{name}": down.cpu().contiguous() for name, (down, _) in adapters.factors.items()}
    tensors |= {f"{UP}{name}": up.cpu().contiguous() for name, (_, up) in adapters.factors.items()}
    about = {"rank": adapters.rank, "alpha": adapters.alpha, "scions": [str(site) for site in scions]}
    save_file(tensors, folder / FILE, {ABOUT: json.dumps(about)})


def kept_adapters(folder: Path) -> KeptAdapters | None:
    """Return the adapters that `keep_adapters` wrote; None if there are none."""
    if not (folder / FILE).is_file():
        return None
    with safe_open(folder / FILE, "pt") as file:
        about = json.loads(file.metadata()[ABOUT])
        names = [name.removeprefix(DOWN) for name in file.keys() if name.startswith(DOWN)]  # noqa: SIM118  # no dict
        factors = {name: (file.get_tensor(f"{DOWN}{name}"), file.get_tensor(f"{UP}{name}")) for name in sorted(names)}
    return KeptAdapters(Adapters(about["rank"], about["alpha"], factors), tuple(about["scions"]))


def write_peft(adapters: Adapters, folder: Path) -> None:
    """Write what peft's `PeftModel.from_pretrained` loads, for a model whose layers have the adapters' names."""
    from peft import LoraConfig

    config = LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=[], inference_mode=True).to_dict()
    config |= {"target_modules": list(adapters.factors)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=1))
    tensors = {}
    for name, (down, up) in adapters.factors.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = down.clone()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = up.contiguous().clone()
    save_file(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})


def renamed(adapters: Adapters, names: Callable[[str], Sequence[str]]) -> Adapters:
    """Return the adapters of the layers that a layer is made of, row upon row, as `names` gives them.

    Each of these has the same `down` and its own rows of `up`.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for ours, (down, up) in adapters.factors.items():
        theirs = names(ours)
        factors |= {name: (down, rows) for name, rows in zip(theirs, up.chunk(len(theirs)), strict=True)}
    return Adapters(adapters.rank, adapters.alpha, factors)


def prefixed(prefix: str) -> Callable[[Adapters], Adapters]:
    """Return what puts a prefix before the names of layers."""
    return lambda adapters: renamed(adapters, lambda layer: [f"{prefix}{layer}"])


def layers_by_tensors(tensors: Mapping[str, Sequence[str]]) -> Callable[[str], Sequence[str]]:
    """Return what gives the layers that a layer is made of, by the tensors that its weight is made of."""
    return lambda layer: [name.removesuffix(".weight") for name in tensors[f"{layer}.weight"]]
