"""Operators: modules that map (B,N,D) to (B,N,D), built from their specs.

A module registers itself for its spec's class; every builder is called with the spec and the place it goes to. The
definition here is plain PyTorch and is the reference.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from graftwork.specs.operators import OperatorSpec, Place, Target

Builder = Callable[[Any, Place], nn.Module]
B = TypeVar("B", bound=Builder)
Shapes = Mapping[str, tuple[int, ...]]  # of an operator's tensors, by name
Settings = Callable[[Shapes, Place], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """How an operator is built, and how its settings are read off the shapes of its tensors."""

    build: Builder
    settings: Settings
    inherits: Mapping[str, str] = field(default_factory=dict)  # its layers -> those of a DiT's operators


REGISTRY: dict[type[OperatorSpec], Entry] = {}


def register(
    spec: type[OperatorSpec],
    settings: Settings = lambda shapes, place: {},
    inherits: Mapping[str, str] | None = None,
) -> Callable[[B], B]:
    """Decorate a module that is made as `module(spec, place)`, or a function that makes one.

    settings: the fields of the spec that a checkpoint's shapes tell, for a file that names no operators; by default
    none, so that only operators with default settings are recognised. Given the tensors of another operator it may
    raise what comes of that: LookupError, ArithmeticError, ValueError.
    inherits: which of its layers can begin with the weights of which layer of the rootstock's operator, `qkv` and
    `proj` of attention, `fc1` and `fc2` of an MLP.
    """

    def keep(builder: B) -> B:
        REGISTRY[spec] = Entry(builder, settings, inherits or {})
        return builder

    return keep


def build_operator(spec: OperatorSpec, place: Place) -> nn.Module:
    """A freshly initialised operator."""
    return REGISTRY[type(spec)].build(spec, place)


def recognise(shapes: Shapes, target: Target, place: Place) -> OperatorSpec | None:
    """The operator for `target` whose tensors have just these names and shapes; None where there is none.

    No tensors are those of no operator: whether it has none or they are missing, only a file's words can tell.
    """
    if not shapes:
        return None
    for kind, entry in REGISTRY.items():
        if target not in kind.targets:
            continue
        try:
            spec = kind(**entry.settings(shapes, place))
        except (LookupError, ArithmeticError, ValueError):  # not this kind's tensors, or settings it does not take
            continue
        if spec.misfit(place) is None and shapes == _shapes(spec, place):
            return spec
    return None


def _shapes(spec: OperatorSpec, place: Place) -> Shapes:
    with torch.device("meta"):
        operator = build_operator(spec, place)
    return {name: tuple(value.shape) for name, value in operator.state_dict().items()}


# Importing a module registers its operators, so that a file put here is found.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
