"""What training tools wrap around a model's tensors, taken off: state dicts in dicts, and prefixes of names.

    {"ema": {"module.x_embedder..": ..}, "model": .., "opt": ..}      ->  x_embedder..     (`ema.module`)
    {"state_dict": {"model._orig_mod.x_embedder..": ..}, ..}          ->  x_embedder..     (`state_dict.model`)

No wrapper is known by its name: a model lies wherever a tensor is that every model of a family has (the first of its
`FamilyFiles.telling`), and what stands before that tensor's name, in its file, stands before all of the model's. Of
several models the averaged one is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.files import Tensors, in_memory
from graftwork.models.rootstocks import CONFIGS

DIFFUSERS = "pos_embed.proj.weight"  # a tensor of every DiT in diffusers' layout
# Modules that torch.compile, FSDP, activation checkpointing and DeepSpeed put around a model, or around a block of it.
AROUND = re.compile(r"(?:(?<=\.)|^)_(?:\w+_)?mod(?:ule)?\.")
AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averaged?|shadow", re.IGNORECASE)
TRAINED = {"", "model", "module", "net", "network", "state_dict", "model_state_dict", "diffusion_model"}  # or its kind
OPTIMIZER = re.compile(r"opt(im(izers?)?)?(_|$)")


@dataclass(frozen=True)
class Model:
    """A model in a file: where it lies there, and its tensors under their own names."""

    label: str
    tensors: Tensors
    beside: tuple[str, ...]  # tensors of the same state dict that are not of any model


def anchors_of_families() -> tuple[str, ...]:
    """Return a tensor of every model, for each of the registered families."""
    return tuple(dict.fromkeys(next(iter(config.files.telling)) for config in CONFIGS.values()))


def model_in(source: str, content: Any) -> tuple[Tensors, list[str]]:
    """Return the tensors of the model that a torch file holds, and what is to be said of the choice.

    Where no model is to be seen in it, those of its only state dict; raises UnfitCheckpoint if there is not one.
    """
    states = {label: in_memory(source, state) for label, state in _state_dicts(content)}
    anchors = anchors_of_families()
    models = [model for label, tensors in states.items() for model in _models(label, tensors, anchors)]
    if models:
        return _chosen(source, models)
    if len(states) == 1:
        return next(iter(states.values())), []
    if states:
        absent = " or ".join(anchors)
        raise UnfitCheckpoint(f"{source}: has no {absent} in any of its state dicts: {named(list(states), 5, ', ')}")
    keys = named([str(key) for key in content], 5, ", ") if isinstance(content, Mapping) else ""
    raise UnfitCheckpoint(f"{source}: {f'has {keys}, ' if keys else ''}holds no state dict")


def unwrapped(tensors: Tensors, anchors: Sequence[str] = ()) -> tuple[Tensors, list[str]]:
    """Do as `model_in` does, for a file that holds nothing but tensors. anchors: others than the families' own."""
    models = list(_models("", tensors, anchors or anchors_of_families()))
    return _chosen(tensors.source, models) if models else (tensors, [])


def _state_dicts(content: Any, label: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts in a file, with the keys that lead to them; other values may stand in them."""
    if not isinstance(content, Mapping) or OPTIMIZER.match(label.rpartition(".")[2]):
        return
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if state and all(isinstance(name, str) for name in state):
        yield label, state
    for name, value in content.items():
        yield from _state_dicts(value, f"{label}.{name}" if label else str(name))


def _models(label: str, tensors: Tensors, anchors: Sequence[str]) -> Iterator[Model]:
    """Yield the models in a state dict: one for each prefix that an anchor has in it."""
    names = _without_modules_around(tensors.shapes)
    all_prefixes = (
        name.removesuffix(anchor)
        for name in names
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    )
    prefixes = list(dict.fromkeys(all_prefixes))
    members = {prefix: _members(prefix, prefixes, names) for prefix in prefixes}
    in_models = {name for own in members.values() for name in own.values()}
    beside = tuple(name for name in tensors.shapes if name not in in_models and tensors.shapes[name])
    for prefix, own in members.items():
        averages = _dotless_averages(prefix, own, beside)
        others = tuple(name for name in beside if name not in averages.values())
        yield Model(_joined(label, prefix), tensors.renamed(own), others)
        if averages:
            where = next(iter(averages.values())).partition(".")[0]
            yield Model(_joined(label, where), tensors.renamed({**own, **averages}), others)


def _joined(*labels: str) -> str:
    return ".".join(part for label in labels if (part := label.removesuffix(".")))


def _dotless_averages(prefix: str, own: Mapping[str, str], beside: Iterable[str]) -> dict[str, str]:
    """Find averages of a model's tensors under names without dots, as LitEma keeps them: `model.a.b` as `model_ema.ab`.

    What is not trained, as the embedding of positions, has none.
    """
    averages = {name.partition(".")[2]: name for name in beside if AVERAGED.search(name.partition(".")[0])}
    within = prefix.partition(".")[2]
    return {name: found for name in own if (found := averages.get(f"{within}{name}".replace(".", "")))}


def _members(prefix: str, prefixes: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return a model's tensors by their own names; those of another model within it are not its own."""
    within = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    return {
        name.removeprefix(prefix): given
        for name, given in names.items()
        if name.startswith(prefix) and not (within and name.startswith(within))
    }


def _without_modules_around(originals: Iterable[str]) -> dict[str, str]:
    """Map names without the modules around others to the original names. If two would be the same, change none."""
    originals = list(originals)
    names = {AROUND.sub("", name): name for name in originals}
    return names if len(names) == len(originals) else {name: name for name in originals}


def _chosen(source: str, models: list[Model]) -> tuple[Tensors, list[str]]:
    """Return the averaged model, else the trained one, else the only one; raise UnfitCheckpoint if several are left."""
    labels = [model.label for model in models]
    averaged = [model for model in models if AVERAGED.search(model.label)]
    trained = [model for model in models if set(model.label.split(".")) <= TRAINED | CONFIGS.keys()]
    chosen = next((some for some in (averaged, trained, models) if some), models)
    if len(chosen) > 1:
        several = named([model.label for model in chosen], 5, ", ")
        raise UnfitCheckpoint(f"{source}: holds several models: {several}", "one of them, in a file of its own")
    (model,) = chosen
    notes = []
    if len(models) > 1:
        others = named([label for label in labels if label != model.label], 5, ", ")
        notes.append(f"{source}: {model.label or 'the model at the top'} is read, not {others or 'the one at the top'}")
    if model.label and model.beside:
        count = f"{len(model.beside)} tensors" if len(model.beside) > 1 else "1 tensor"
        notes.append(f"{source}: {count} beside {model.label} left out: {named(model.beside, 3, ', ')}")
    return model.tensors, notes
